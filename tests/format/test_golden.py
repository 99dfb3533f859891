"""The golden stores: what earlier versions wrote is read by today's code, and none of it is ever edited."""

from __future__ import annotations

import hashlib
import math
import shutil
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from crc32c import crc32c
from safetensors.torch import load_file

import cloudckpt
from cloudckpt import Settings
from cloudckpt.core import keys
from cloudckpt.core.folder import stored_files
from cloudckpt.core.index_json import decode_index, encode_index
from cloudckpt.core.manifest_json import decode_manifest, encode_manifest
from cloudckpt.core.model import Cells, State
from cloudckpt.errors import FormatError
from cloudckpt.tensors.boxes import plan_boxes
from cloudckpt.tensors.reading import Reading
from cloudckpt.tensors.targets import Part
from cloudckpt.testing import check_store
from tests.tooling import tool_module

ROOT = Path(__file__).parents[2]
V1 = Path(__file__).parent / "golden" / "v1"
#: One checkpoint of four ranks, with sharded tensors, state of each rank's own, and cells of 4096 bytes.
V1_CELLS = Path(__file__).parent / "golden" / "v1-cells"
#: One checkpoint of files.
V1_FOLDER = Path(__file__).parent / "golden" / "v1-folder"
#: One checkpoint, whose manifest has a digest; those of the others are from before there was one.
V1_DIGEST = Path(__file__).parent / "golden" / "v1-digest"

#: The files that were saved.
FILES = {
    "config.json": b'{"layers": 2}\n',
    "weights/model.bin": bytes(range(256)) * 3,
    "weights/empty.bin": b"",
    "$notes.txt": "größe\n".encode(),
    "größe mit raum": b"\xff\x00",
}

#: step -> save id, state, val_loss, why it is kept
LISTING = {
    100: ("f4bb65ce", State.COMMITTED, 0.9, ("pinned",)),
    200: ("22772ae6", State.COMMITTED, 0.3, ("best #1",)),
    300: ("958e25a7", State.RETIRED, 0.7, ()),
    400: ("dcb11e9e", State.COMMITTED, math.nan, ("last #2",)),
    500: ("593a30f0", State.COMMITTED, 0.5, ("last #1",)),
    600: ("e42397d4", State.PENDING, 0.1, ("best #1", "last #1")),
}

#: name -> dtype, shape, the bytes in row-major order
TENSORS: dict[str, tuple[torch.dtype, tuple[int, ...], bytes]] = {
    "embedding.weight": (
        torch.float32,
        (2, 3),
        struct.pack("<6I", 0, 0x80000000, 0x3FC00000, 0x7F800000, 0x7FC00000, 0xC0000000),
    ),
    "head.weight": (
        torch.float32,
        (2, 3),
        struct.pack("<6I", 0, 0x80000000, 0x3FC00000, 0x7F800000, 0x7FC00000, 0xC0000000),
    ),
    "__metadata__": (torch.int16, (1,), struct.pack("<h", 7)),
    "größe": (torch.float64, (2,), struct.pack("<2d", 1.5, -2.5)),
    "half": (torch.float16, (2,), struct.pack("<2e", 0.5, 65504.0)),
    "brain": (torch.bfloat16, (2,), struct.pack("<2H", 0x3F80, 0xC040)),
    "eight": (torch.float8_e4m3fn, (2,), bytes([0x30, 0xFE])),
    "flags": (torch.bool, (3,), bytes([1, 0, 1])),
    "bytes": (torch.uint8, (2,), bytes([0, 255])),
    "long": (torch.int64, (2,), struct.pack("<2q", -(2**63), 2**63 - 1)),
    "wave": (torch.complex64, (1,), struct.pack("<2f", 1.0, -2.0)),
    "scalar": (torch.float32, (), struct.pack("<f", 3.25)),
    "empty": (torch.float32, (0, 4), b""),
    "turned": (torch.int32, (3, 2), struct.pack("<6i", 0, 3, 1, 4, 2, 5)),
}


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy that may be written to."""
    return Path(shutil.copytree(V1, tmp_path / "v1"))


def raw(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes in row-major order."""
    flat = tensor.contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b""


def equal_or_both_nan(one: float, other: float) -> bool:
    """Equality for which NaN is like any other number."""
    return one == other or (math.isnan(one) and math.isnan(other))


def test_manifest_is_read_and_written_again_byte_for_byte() -> None:
    """The manifest and its copies decode, and encode to the very same bytes and a digest."""
    for name in ("manifest.json", "manifest-000006.json", "manifest-000012.json"):
        body = (V1 / name).read_bytes()
        again, _, digest = encode_manifest(decode_manifest(body)).rpartition(b',\n "digest": ')
        assert again + b"\n}\n" == body
        assert digest == f'"sha256:{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def test_a_manifest_with_a_digest_is_read_and_written_again_byte_for_byte() -> None:
    """With the digest that it has; and one whose best has another value is refused."""
    bodies = [path.read_bytes() for path in sorted(V1_DIGEST.glob("manifest*.json"))]
    assert len(bodies) == 2
    for body in bodies:
        assert encode_manifest(decode_manifest(body)) == body
        assert body.count(b'"val_loss": 0.5') == 1
        with pytest.raises(FormatError, match="changed after it was written"):
            decode_manifest(body.replace(b'"val_loss": 0.5', b'"val_loss": 4.5'))
    assert [best.ids for best in cloudckpt.open(V1_DIGEST).manifest().best] == [("7c780692",)]


def test_indexes_are_read_and_written_again_byte_for_byte() -> None:
    """Every index decodes, and encodes to the very same bytes."""
    bodies = [path.read_bytes() for path in sorted(V1.glob("checkpoint-*/checkpoint.json"))]
    assert len(bodies) == 5
    for body in bodies:
        assert encode_index(decode_index(body)) == body


def test_every_file_is_of_the_grammar() -> None:
    """The store holds nothing foreign, and no lock."""
    kinds = {keys.parse(path.relative_to(V1).as_posix()).kind for path in V1.rglob("*") if path.is_file()}
    assert kinds == {keys.Kind.MANIFEST, keys.Kind.COPY, keys.Kind.INDEX, keys.Kind.PAYLOAD}


def test_listing() -> None:
    """Ids, states, metrics and reasons are those that were written; best and recent follow from them."""
    run = cloudckpt.open(V1)
    found = {c.step: c for c in run.checkpoints(state=None)}
    assert found.keys() == LISTING.keys()
    for step, (save_id, state, loss, why) in LISTING.items():
        assert (found[step].id, found[step].state, found[step].kept_because) == (save_id, state, why)
        assert equal_or_both_nan(found[step].metrics["val_loss"], loss)
    manifest = run.manifest()
    assert [best.ids for best in manifest.best] == [("22772ae6",)]
    assert manifest.recent == ("593a30f0", "dcb11e9e")
    assert str(manifest.policy) == "last 2, best 1 by val_loss (min)"
    assert found[100].pinned
    assert found[200].tags == ("release",)
    assert found[300].retired_because == "not in best 1, not in last 2"
    assert [run.select(word).step for word in ("latest", "best", "tag:release", "100", "dcb1")] == [
        500,
        200,
        200,
        100,
        400,
    ]


def check_rich(loaded: dict[str, Any]) -> None:
    """Check the state of step 100."""
    model = loaded["model"]
    assert list(model) == list(TENSORS)
    assert {n: (t.dtype, tuple(t.shape), raw(t)) for n, t in model.items()} == TENSORS
    assert model["embedding.weight"].data_ptr() == model["head.weight"].data_ptr()
    values = loaded["values"]
    assert math.isnan(values.pop("nan"))
    expected = {
        "epoch": 3,
        "name": "gölden",
        "nothing": None,
        "betas": (0.9, 0.999),
        "nested": [{"a": [1, 2.5, True]}, {"b": {7: "seven", "x": b"\x00\xff"}}],
        "order": OrderedDict([("z", 1), ("a", 2)]),
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "big": 2**80,
    }
    assert values == expected
    assert {n: type(v) for n, v in values.items()} == {n: type(v) for n, v in expected.items()}


def check_all(root: Path, *, plain: tuple[int, ...] = (200, 400, 500)) -> None:
    """Check the state of step 100 and of some of the ordinary steps."""
    run = cloudckpt.open(root)
    check_rich(run.load(100))
    for step in plain:
        loaded = run.load(step)
        assert loaded["step"] == step
        assert torch.equal(loaded["model"]["w"], torch.full((4,), float(step)))


def test_every_checkpoint_loads_what_was_saved() -> None:
    """Each committed checkpoint gives the values that were saved: every bit, type, order and tie."""
    check_all(V1)


def test_payload_files_are_safetensors() -> None:
    """The safetensors library reads every payload file; tied tensors once, reserved names escaped."""
    names = sorted(V1.glob("checkpoint-*/*.safetensors"))
    assert len(names) == 6
    for path in names:
        tensors = load_file(path)
        if path.parent.name.startswith("checkpoint-100."):
            stored = {n: tensors["__metadata__~1" if n == "__metadata__" else n] for n in TENSORS if n != "head.weight"}
            assert len(tensors) == len(stored)
            for name, tensor in stored.items():
                dtype, shape, body = TENSORS[name]
                # Format 1 stores complex numbers as bytes; the index has their dtype.
                expected = (torch.uint8, (len(body),)) if dtype.is_complex else (dtype, shape)
                assert (tensor.dtype, tuple(tensor.shape)) == expected
                assert raw(tensor) == body
        else:
            assert list(tensors) == ["w"]


def test_verify_reads_every_byte_of_a_copy(copied: Path) -> None:
    """Every checksum is right, and every invariant that can be seen from outside holds."""
    report = cloudckpt.verify(copied, deep=True)
    assert report.ok
    assert [c.step for c in report.checkpoints] == [100, 200, 400, 500]
    assert report.bytes_read > 0
    check_store(cloudckpt.open(copied)._store.storage)


def test_a_new_writer_goes_on_from_a_copy(copied: Path) -> None:
    """A claim settles what was left, a save goes on under the stored policy, and old checkpoints stay loadable."""
    state: dict[str, Any] = {"model": {"w": torch.zeros(4)}, "step": 0}
    with cloudckpt.CheckpointManager(copied) as ckpts:
        resumed = ckpts.restore(state)
        assert resumed is not None
        assert resumed.step == 500
        assert state["step"] == 500
        assert torch.equal(state["model"]["w"], torch.full((4,), 500.0))
        check_all(copied)
        ckpts.save(700, {"model": {"w": torch.full((4,), 700.0)}, "step": 700}, metrics={"val_loss": 0.4}, block=True)
    run = cloudckpt.open(copied)
    # 300 was retired and 600 never sealed: both are gone with their bytes. 400 is let go by the new commit.
    assert {c.step: c.state for c in run.checkpoints(state=None)} == dict.fromkeys(
        (100, 200, 500, 700), State.COMMITTED
    )
    check_all(copied, plain=(200, 500, 700))
    check_store(run._store.storage, settled=True)


def test_repair_of_a_copy_without_its_manifest(copied: Path) -> None:
    """With the manifest deleted, its newest copy and the indexes bring everything committed back, held."""
    (copied / "manifest.json").unlink()
    plan = cloudckpt.repair(copied, dry_run=False)
    assert plan.basis == "manifest-000012.json"
    assert [c.step for c in plan.admitted] == [100, 200, 400, 500]
    assert all(c.held for c in plan.admitted)
    check_all(copied)


def test_cells_are_read_and_written_again_byte_for_byte() -> None:
    """The index with the sums of cells decodes, and encodes to the very same bytes; an index without has none."""
    (path,) = V1_CELLS.glob("checkpoint-*/checkpoint.json")
    body = path.read_bytes()
    index = decode_index(body)
    assert encode_index(index) == body
    for item in index.objects:
        stored = (path.parent / item.name).read_bytes()
        assert item.cells == Cells(
            size_bytes=4096, crc32c=tuple(crc32c(stored[at : at + 4096]) for at in range(0, len(stored), 4096))
        )
    for path in V1.glob("checkpoint-*/checkpoint.json"):
        assert all(item.cells is None for item in decode_index(path.read_bytes()).objects)


def test_what_four_ranks_saved_is_loaded_whole() -> None:
    """Without a process group: the tensors whole, and what each rank had for itself in a list by rank."""
    loaded = cloudckpt.open(V1_CELLS).load()
    numbers = torch.arange(3 * 4096, dtype=torch.int32)
    assert torch.equal(loaded["model"]["rows"], numbers.reshape(48, -1))
    assert torch.equal(loaded["model"]["columns"], numbers.flip(0).reshape(2, -1))
    assert raw(loaded["model"]["same"]) == struct.pack("<2f", 1.5, -0.0)
    assert loaded["step"] == 100
    assert [own["position"] for own in loaded["data"]] == [0, 10, 20, 30]
    for rank, own in enumerate(loaded["data"]):
        assert torch.equal(own["order"], torch.full((4096,), rank, dtype=torch.int16))


@pytest.mark.parametrize(("name", "most"), [("rows", 2 * 4096), ("columns", 4 * 4096)])
def test_a_part_is_read_by_its_cells(name: str, most: int) -> None:
    """Some rows, and some columns, out of the cells they lie in, whoever wrote them."""
    run = cloudckpt.open(V1_CELLS)
    entry, index = run.select("latest"), run.index("latest")
    whole = run.load()["model"][name]
    offsets, lengths = ((13, 5), (2, 200)) if name == "rows" else ((0, 100), (2, 300))
    box = whole[tuple(slice(first, first + count) for first, count in zip(offsets, lengths, strict=True))]
    local = torch.zeros(lengths, dtype=torch.int32)
    chosen = Settings(read_gap_bytes=1)
    boxes = plan_boxes(
        [(index.tensors["model"][name], Part(value=local, local=local, offsets=offsets))], index.objects, chosen
    )
    assert sum(extent.length for extent in boxes.extents) <= most
    Reading(run._store.storage, entry, boxes.extents, chosen).run()
    boxes.assemble()
    assert torch.equal(local, box)


def test_verify_reads_every_byte_of_what_four_ranks_saved(tmp_path: Path) -> None:
    """Every checksum is right, and every invariant that can be seen from outside holds."""
    copied = shutil.copytree(V1_CELLS, tmp_path / "v1")
    assert cloudckpt.verify(copied, deep=True).ok
    check_store(cloudckpt.open(copied)._store.storage, settled=True)


def test_the_files_of_a_folder_come_back(tmp_path: Path) -> None:
    """Every byte of every file, with torch and by what the index says without it; and the index encodes as it was."""
    copied = shutil.copytree(V1_FOLDER, tmp_path / "v1")
    run = cloudckpt.open(copied)
    folder = run.load_folder(tmp_path / "back")
    assert folder.name == "checkpoint-100"
    assert {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == FILES
    (path,) = copied.glob("checkpoint-*/checkpoint.json")
    index = decode_index(path.read_bytes())
    assert encode_index(index) == path.read_bytes()
    stored = stored_files(index, "golden")
    assert stored is not None
    for name, entry in stored.items():
        (chunk,) = entry.chunks
        body = (path.parent / chunk.object).read_bytes()[chunk.start : chunk.start + chunk.length]
        assert (body, chunk.crc32c) == (FILES[name], crc32c(FILES[name]))
    assert stored.keys() == FILES.keys()
    assert cloudckpt.verify(copied, deep=True).ok
    check_store(cloudckpt.open(copied)._store.storage, settled=True)


@pytest.mark.parametrize("write", ["make", "make_with_cells", "make_with_folder", "make_with_digest"])
def test_a_golden_store_is_never_written_again(copied: Path, write: str) -> None:
    """The tool that made it refuses a folder that is there."""
    module = tool_module("make_golden")
    with pytest.raises(SystemExit, match="never written again"):
        getattr(module, write)(copied)
    assert (copied / "manifest.json").read_bytes() == (V1 / "manifest.json").read_bytes()
