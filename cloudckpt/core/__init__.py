"""The pure core: values in, values out. Standard library only; no I/O, clock, chance, logging or threads."""
