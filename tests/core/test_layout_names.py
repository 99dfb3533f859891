from __future__ import annotations

from cloudckpt.core.layout import item_size, torch_name


def test_dtypes_have_a_size_and_a_name_both_ways() -> None:
    """Torch's names of what safetensors can name, and nothing for the others."""
    assert (item_size("bfloat16"), torch_name("BF16")) == (2, "bfloat16")
    assert (item_size("complex64"), torch_name("C64")) == (None, None)
