"""Where torch begins: the caller's state as tensors and values, planned, staged and filled again."""
