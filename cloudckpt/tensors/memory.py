"""Tensors as bytes, whatever their dtype, and bytes as tensors again. Nothing here converts a value."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from cloudckpt.errors import CorruptCheckpointError

__all__ = [
    "PLAIN",
    "byte_view",
    "check_storable",
    "copy_bits",
    "copy_elements",
    "dtype_name",
    "dtype_named",
    "is_plain",
    "lies_flat",
    "same_bits_dtype",
    "typed_view",
]

_NAMES: dict[torch.dtype, str] = {}

_DTYPES: dict[str, torch.dtype] = {
    str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)
}

#: An integer dtype of the same width: copying through it moves bits and never meets a missing kernel.
_SAME_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    found = _NAMES.get(dtype)
    if found is None:
        found = _NAMES[dtype] = str(dtype).removeprefix("torch.")
    return found


def dtype_named(name: str) -> torch.dtype:
    """The dtype of this name.

    Raises:
        CorruptCheckpointError: this torch has none.
    """
    found = _DTYPES.get(name)
    if found is None:
        raise CorruptCheckpointError(
            f"a tensor has dtype {name!r:.60}, which torch {torch.__version__} does not have: load it with the torch "
            "it was saved with, or a newer one"
        )
    return found


#: The types whose bytes are their value, if the tensor is dense.
PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, torch.nn.Buffer})


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether ``check_storable`` has nothing to say, by the few looks that settle it for nearly every tensor."""
    return (
        type(tensor) in PLAIN
        and tensor.layout is torch.strided
        and not (tensor.is_meta or tensor.is_quantized or tensor.is_nested)
        and _has_memory(tensor)
    )


def _has_memory(tensor: torch.Tensor) -> bool:
    """Whether its elements lie in its storage. One that was freed or cut is read, and crashes, like any other."""
    elements = tensor.numel()
    if not elements:
        return True
    if not tensor.is_contiguous():
        elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = (tensor.storage_offset() + elements) * tensor.dtype.itemsize
    return tensor.data_ptr() != 0 and end <= tensor.untyped_storage().nbytes()


def lies_flat(tensor: torch.Tensor) -> bool:
    """Whether the tensor's bytes lie in host memory as they are stored: it can be sent from where it is."""
    return tensor.is_cpu and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())


def check_storable(tensor: torch.Tensor, path: str) -> None:
    """Refuse tensors whose bytes alone are not their value.

    Raises:
        TypeError: it is sparse, quantized, nested, on the meta device, fake, lazy, without memory, or a subclass with
            parts of its own; names the path.
    """
    problem = None
    if torch.nn.parameter.is_lazy(tensor):
        problem = "is not initialised yet: run the lazy module once before you save it"
    elif tensor.device.type == "meta":
        problem = "is on the meta device and has no data: materialise it first (to_empty, then initialise)"
    elif isinstance(tensor, torch._subclasses.FakeTensor):  # noqa: SLF001 - its only name
        problem = "is a fake tensor and has no data"
    elif tensor.is_quantized:
        problem = "is quantized (scale and zero point are not in its bytes): save int_repr() and its parameters"
    elif tensor.layout != torch.strided or tensor.is_nested:
        problem = f"has layout {tensor.layout}: save its indices and values, or to_dense(), instead"
    elif type(tensor) not in PLAIN and hasattr(tensor, "__tensor_flatten__"):
        problem = f"is a {type(tensor).__qualname__}, a tensor made of several: save its parts"
    elif not hasattr(tensor, "__tensor_flatten__") and not _has_memory(tensor):
        problem = (
            "has no memory, or less than its shape needs (its storage was freed, or it is a wrapper around another "
            "tensor): give it some first, or save what it stands for"
        )
    if problem is not None:
        raise TypeError(f"{path}: this tensor {problem}")


def same_bits_dtype(dtype: torch.dtype) -> torch.dtype:
    """A dtype of the same width that every device can copy."""
    return _SAME_BITS[dtype.itemsize]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.detach().resolve_conj().resolve_neg()
    wanted = same_bits_dtype(plain.dtype)
    return plain if plain.dtype == wanted else plain.view(wanted)


def copy_bits(target: torch.Tensor, source: torch.Tensor, *, non_blocking: bool = False) -> None:
    """Copy ``source`` into ``target`` (same dtype and shape), bit for bit, from any device and any strides."""
    if target.is_conj() or target.is_neg():
        # What such a view shows is no memory of its own: only torch can write through it.
        target.copy_(source, non_blocking=non_blocking)
        return
    _bits(target).copy_(_bits(source), non_blocking=non_blocking)


def copy_elements(
    target: torch.Tensor, source: torch.Tensor, start: int, stop: int, *, non_blocking: bool = False
) -> None:
    """Copy elements ``start`` to ``stop`` of ``source`` in row-major order into ``target`` (flat, of the same dtype).

    Whatever the strides, no more than these elements is ever copied.
    """
    if source.dim() == 0 or (start == 0 and stop == source.numel()):
        copy_bits(target.view(source.shape), source, non_blocking=non_blocking)
        return
    if source.is_contiguous():
        copy_bits(target, source.view(-1)[start:stop], non_blocking=non_blocking)
        return
    row = source.numel() // source.shape[0]
    first, last = -(-start // row), stop // row
    if first > last:  # a part of one row
        copy_elements(target, source[last], start - last * row, stop - last * row, non_blocking=non_blocking)
        return
    head, rows = first * row - start, last - first
    if head:
        copy_elements(target[:head], source[first - 1], row - head, row, non_blocking=non_blocking)
    if rows:
        whole = target[head : head + rows * row].view(rows, *source.shape[1:])
        copy_bits(whole, source[first:last], non_blocking=non_blocking)
    if tail := stop - last * row:
        copy_elements(target[-tail:], source[last], 0, tail, non_blocking=non_blocking)


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared with it."""
    flat = torch.empty(0, dtype=torch.uint8, device="cpu")
    start = tensor.storage_offset() * tensor.dtype.itemsize
    flat.set_(tensor.untyped_storage(), start, (tensor.numel() * tensor.dtype.itemsize,))  # type: ignore[call-overload]  # torch's stub lacks the untyped overload
    return memoryview(flat.numpy())  # type: ignore[arg-type]  # an ndarray is a buffer; its stub says so from 3.12 on


def typed_view(buffer: torch.Tensor, start: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """A tensor over ``buffer`` (uint8) from byte ``start``; ``start`` is a multiple of the element size."""
    length = math.prod(shape) * dtype.itemsize
    return buffer[start : start + length].view(dtype).view(tuple(shape))
