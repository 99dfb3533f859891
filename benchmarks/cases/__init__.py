"""The cases: ours, the peers as their users call them, and the limits of the machine. One family a file."""
