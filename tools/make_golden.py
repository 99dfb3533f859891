"""Write the golden stores of the current format: small real runs that every later version must read.

    python tools/make_golden.py

``v1`` is a run of one process, with fixed clock and tokens. ``v1-cells`` is one checkpoint of four ranks: sharded
tensors, state that each rank has for itself, and objects with the sums of their cells, which are small ones there.
``v1-folder`` is one checkpoint of files, ``v1-digest`` one whose manifest has a digest.

Only for what the format has new: an existing golden store is never written again, whatever the code does today. The
versions of Python and torch in the indexes are those that run this script.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed
import torch.multiprocessing

from cloudckpt import CheckpointManager, PerRank, claiming
from cloudckpt.config import Settings
from cloudckpt.coordination import SingleProcess
from cloudckpt.core import keys
from cloudckpt.core.model import FORMAT
from cloudckpt.core.policy import PolicyWords
from cloudckpt.errors import SaveError, StorageError
from cloudckpt.events import Listeners
from cloudckpt.saving import Saver, SaveRequest
from cloudckpt.saving.leading import Leading
from cloudckpt.storage import LocalStorage, ManifestStore
from cloudckpt.storage.base import Buffer
from cloudckpt.tensors.arena import Arena
from cloudckpt.tensors.planning import Planner

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "format" / "golden"
PLACE = GOLDEN / f"v{FORMAT}"
WITH_CELLS = GOLDEN / f"v{FORMAT}-cells"
WITH_FOLDER = GOLDEN / f"v{FORMAT}-folder"
WITH_DIGEST = GOLDEN / f"v{FORMAT}-digest"

#: What is in the folder of ``v1-folder``.
FILES = {
    "config.json": b'{"layers": 2}\n',
    "weights/model.bin": bytes(range(256)) * 3,
    "weights/empty.bin": b"",
    "$notes.txt": "größe\n".encode(),
    "größe mit raum": b"\xff\x00",
}

RANKS = 4
CELL_BYTES = 4096


class Refusing(LocalStorage):
    """A disk that can be told to delete nothing more, and to take no further index: what a crash would leave."""

    deletes = True
    seals = True

    def delete(self, keys: Iterable[str]) -> dict[str, StorageError]:
        """See ``Storage.delete``."""
        return (
            super().delete(keys) if self.deletes else {key: StorageError("kept for the golden store") for key in keys}
        )

    def put(
        self, key: str, buffers: Iterable[Buffer], *, size_bytes: int, progress: Callable[[int], None] | None = None
    ) -> None:
        """See ``Storage.put``."""
        if not self.seals and key.endswith(keys.INDEX_NAME):
            raise StorageError("not sealed, for the golden store")
        super().put(key, buffers, size_bytes=size_bytes, progress=progress)


class Fixed:
    """A clock that goes on by a minute at each look, and tokens that are the same every time."""

    def __init__(self) -> None:
        self.minutes = 0
        self.tokens = 0

    def clock(self) -> str:
        """The next time label."""
        self.minutes += 1
        return f"2026-01-31T{12 + self.minutes // 60}:{self.minutes % 60:02d}:00.000Z"

    def token(self, digits: int) -> str:
        """The next token."""
        self.tokens += 1
        return hashlib.sha256(f"golden {self.tokens}".encode()).hexdigest()[:digits]


def rich_state() -> dict[str, object]:
    """One tensor of many dtypes, a tied one, odd names and shapes, nested values."""
    weight = torch.tensor([[0.0, -0.0, 1.5], [math.inf, math.nan, -2.0]])
    model = {
        "embedding.weight": weight,
        "head.weight": weight,
        "__metadata__": torch.tensor([7], dtype=torch.int16),
        "größe": torch.tensor([1.5, -2.5], dtype=torch.float64),
        "half": torch.tensor([0.5, 65504.0], dtype=torch.float16),
        "brain": torch.tensor([1.0, -3.0], dtype=torch.bfloat16),
        "eight": torch.tensor([0.5, -448.0]).to(torch.float8_e4m3fn),
        "flags": torch.tensor([True, False, True]),
        "bytes": torch.tensor([0, 255], dtype=torch.uint8),
        "long": torch.tensor([-(2**63), 2**63 - 1]),
        "wave": torch.tensor([1.0 - 2.0j], dtype=torch.complex64),
        "scalar": torch.tensor(3.25),
        "empty": torch.empty(0, 4),
        "turned": torch.arange(6, dtype=torch.int32).reshape(2, 3).t(),
    }
    values = {
        "epoch": 3,
        "name": "gölden",
        "nothing": None,
        "betas": (0.9, 0.999),
        "nested": [{"a": [1, 2.5, True]}, {"b": {7: "seven", "x": b"\x00\xff"}}],
        "order": OrderedDict([("z", 1), ("a", 2)]),
        "nan": math.nan,
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "big": 2**80,
    }
    return {"model": model, "values": values}


def state(step: int) -> dict[str, object]:
    """The state of an ordinary step."""
    return {"model": {"w": torch.full((4,), float(step))}, "step": step}


def request(
    step: int, value: dict[str, object], loss: float | None, *, tags: tuple[str, ...] = (), pin: bool = False
) -> SaveRequest:
    """One save of the run."""
    metrics = {} if loss is None else {"val_loss": loss}
    return SaveRequest(step=step, state=value, metrics=metrics, tags=tags, pin=pin, block=False, allow_pickle=False)


def _refuse_again(place: Path) -> None:
    if place.exists():
        raise SystemExit(f"{place} exists: a golden store is never written again. A new format gets a new folder")


@contextlib.contextmanager
def _somewhere() -> Iterator[None]:
    """The owner that the manifest names is nobody's machine."""
    with (
        mock.patch("cloudckpt.claiming.socket", SimpleNamespace(gethostname=lambda: "node-1")),
        mock.patch("cloudckpt.claiming.os", SimpleNamespace(getpid=lambda: 4711)),
        mock.patch.dict(os.environ, {"TORCHELASTIC_RUN_ID": "golden"}),
    ):
        yield


def make(place: Path) -> None:
    """Write the store.

    Raises:
        SystemExit: there is one already.
    """
    _refuse_again(place)
    storage = Refusing(place)
    fixed = Fixed()
    store = ManifestStore(storage, Settings(copy_every_revisions=6), clock=fixed.clock, token=fixed.token)
    silent = Listeners()
    with _somewhere():
        claim = claiming.claim_run(
            store,
            PolicyWords(monitor="val_loss", mode="min", keep_best=1, keep_last=2),
            change_policy=False,
            takeover="last_wins",
            listener=silent,
        )
    alone = SingleProcess()
    side = Leading(store, claim, alone, silent)
    saver = Saver(store, side, alone, silent, writer_epoch=claim.writer_epoch, planner=Planner(0, 1), arena=Arena())

    def save(wanted: SaveRequest) -> None:
        saver.start(wanted, 0.0, ready=lambda: None).wait()

    save(request(100, rich_state(), 0.9, pin=True))
    save(request(200, state(200), 0.3, tags=("release",)))
    save(request(300, state(300), 0.7))
    save(request(400, state(400), math.nan))
    storage.deletes = False  # what the next commit retires keeps its bytes
    save(request(500, state(500), 0.5))
    storage.seals = False  # the last save stays pending, with its payload and without an index
    try:
        save(request(600, state(600), 0.1))
    except SaveError:
        pass
    else:
        raise SystemExit("the last save was meant to fail")
    saver.shut_down()
    (place / keys.LOCK).unlink()


def make_with_cells(place: Path) -> None:
    """Write the store of four ranks.

    Raises:
        SystemExit: there is one already.
    """
    _refuse_again(place)
    with tempfile.TemporaryDirectory() as meeting:
        torch.multiprocessing.spawn(_one_rank, args=(place, f"file://{meeting}/ranks"), nprocs=RANKS)  # type: ignore[attr-defined, no-untyped-call]  # no types
    (place / keys.LOCK).unlink()


def _one_rank(rank: int, place: Path, meeting: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415 - in the processes that need them
    from torch.distributed.tensor import Shard, distribute_tensor  # noqa: PLC0415 - only golden stores of many ranks need it

    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    numbers = torch.arange(3 * CELL_BYTES, dtype=torch.int32)
    state = {
        "model": {
            "rows": distribute_tensor(numbers.reshape(48, -1), mesh, [Shard(0)]),
            "columns": distribute_tensor(numbers.flip(0).reshape(2, -1), mesh, [Shard(1)]),
            "same": torch.tensor([1.5, -0.0]),
        },
        "step": 100,
        "data": PerRank({"position": 10 * rank, "order": torch.full((CELL_BYTES,), rank, dtype=torch.int16)}),
    }
    with (
        _somewhere(),
        mock.patch("cloudckpt.tensors.sums.CELL_BYTES", CELL_BYTES),
        mock.patch("cloudckpt.tensors.sources.CELL_BYTES", CELL_BYTES),
        CheckpointManager(place) as ckpts,
    ):
        ckpts.save(100, state, metrics={"val_loss": 0.5}, block=True)
    torch.distributed.destroy_process_group()


def make_with_folder(place: Path) -> None:
    """Write the store of one folder of files.

    Raises:
        SystemExit: there is one already.
    """
    _refuse_again(place)
    with tempfile.TemporaryDirectory() as written, _somewhere(), CheckpointManager(place) as ckpts:
        for name, body in FILES.items():
            path = Path(written, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(body)
        ckpts.save_folder(100, written, metrics={"val_loss": 0.5}, block=True)
    (place / keys.LOCK).unlink()


def make_with_digest(place: Path) -> None:
    """Write the store of one small checkpoint, the best of its run.

    Raises:
        SystemExit: there is one already.
    """
    _refuse_again(place)
    with _somewhere(), CheckpointManager(place, keep_best=1, monitor="val_loss", mode="min") as ckpts:
        ckpts.save(100, {"w": torch.arange(4.0)}, metrics={"val_loss": 0.5}, block=True)
    (place / keys.LOCK).unlink()


def main() -> None:
    """Write those that are not there, and say what is in them."""
    stores = (
        (PLACE, make),
        (WITH_CELLS, make_with_cells),
        (WITH_FOLDER, make_with_folder),
        (WITH_DIGEST, make_with_digest),
    )
    for place, write in stores:
        if place.exists():
            print(f"{place} is there, and stays as it is")
            continue
        write(place)
        files = sorted(path for path in place.rglob("*") if path.is_file())
        for path in files:
            print(f"{path.stat().st_size:7d}  {path.relative_to(place)}")
        print(f"{sum(path.stat().st_size for path in files):7d}  {place}")


if __name__ == "__main__":
    main()
