"""What a checkpoint costs: cloudckpt beside its peers and beside the limits of the machine. ``make bench``."""
