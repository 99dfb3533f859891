"""PyTorch itself: torch.save, safetensors beside it, and its distributed checkpoint (DCP) on disk and over fsspec."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import torch

from benchmarks.cases.base import Handle, Place, StallCase, case, peer, s3_options
from benchmarks.cases.floors import Done
from benchmarks.state import State, tensors

__all__ = ["dcp_fsspec_save", "serialised"]

#: As Any: it exports names without saying so.
dcp: Any = peer("torch.distributed.checkpoint")


def serialised(state: State) -> io.BytesIO:
    """What torch.save makes of a state, in memory, to be read from its start."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


def _sync(path: Path) -> None:
    for each in (path, path.parent):
        descriptor = os.open(each, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _file_of(place: Place) -> Path:
    folder = Path(place.path)
    folder.mkdir()
    return folder / "file"


# -- local disk --------------------------------------------------------------------------------------------------


@case("save-local", "peer")
def torch_save(state: State, place: Place) -> None:
    """As everybody calls it."""
    torch.save(state, _file_of(place))


@case("save-local", "peer")
def torch_save_fsync(state: State, place: Place) -> None:
    """The same, durable."""
    path = _file_of(place)
    torch.save(state, path)
    _sync(path)


@case("save-local", "peer")
def safetensors_fsync(state: State, place: Place) -> None:
    """save_file, durable; tensors only."""
    path = _file_of(place)
    peer("safetensors.torch").save_file(tensors(state), path)
    _sync(path)


@case("save-local", "peer")
def safetensors(state: State, place: Place) -> None:
    """save_file; tensors only."""
    peer("safetensors.torch").save_file(tensors(state), _file_of(place))


@case("save-local", "peer")
def dcp_default(state: State, place: Place) -> None:
    """FileSystemWriter, which calls fsync on each file."""
    dcp.save(state, storage_writer=dcp.FileSystemWriter(place.path), no_dist=True)


@case("save-local", "peer", name="dcp_fsspec")
def dcp_fsspec_local(state: State, place: Place) -> None:
    """FsspecWriter on a file:// URL."""
    _fsspec_save(state, f"file://{place.path}")


@case("load-local", "peer", name="torch_load")
def torch_load_local(state: State, place: Place) -> State:
    """torch.load into new tensors."""
    found: State = torch.load(f"{place.path}/pt", weights_only=True)
    return found


@case("load-local", "peer", name="safetensors")
def safetensors_load(state: State, place: Place) -> State:
    """load_file into new tensors."""
    found: State = peer("safetensors.torch").load_file(f"{place.path}/st.safetensors")
    return found


@case("load-local", "peer", name="dcp")
def dcp_load_local(state: State, place: Place) -> None:
    """FileSystemReader into the caller's tensors."""
    dcp.load(state, storage_reader=dcp.FileSystemReader(f"{place.path}/dcp"), no_dist=True)


# -- S3 over fsspec ----------------------------------------------------------------------------------------------


def _fsspec_save(state: State, url: str, **options: Any) -> None:
    writer = peer("torch.distributed.checkpoint._fsspec_filesystem").FsspecWriter(url, **options)
    dcp.save(state, storage_writer=writer, no_dist=True)


def dcp_fsspec_save(state: State, place: Place, **options: Any) -> None:
    """DCP's FsspecWriter through s3fs."""
    _fsspec_save(state, f"s3://{place.path}", **options, **s3_options())


@case("save-s3", "peer")
def dcp_fsspec(state: State, place: Place) -> None:
    """FsspecWriter through s3fs, as it comes."""
    dcp_fsspec_save(state, place)


@case("save-s3", "peer")
def dcp_fsspec_4threads(state: State, place: Place) -> None:
    """The same with four threads."""
    dcp_fsspec_save(state, place, thread_count=4)


@case("load-s3", "peer", name="dcp_fsspec")
def dcp_fsspec_load(state: State, place: Place) -> None:
    """FsspecReader through s3fs, into the caller's tensors."""
    reader = peer("torch.distributed.checkpoint._fsspec_filesystem").FsspecReader
    dcp.load(state, storage_reader=reader(f"s3://{place.path}/dcp", **s3_options()), no_dist=True)


# -- beside a training loop --------------------------------------------------------------------------------------

Writer = Callable[[Place], Any]


def _local(place: Place) -> Any:
    return dcp.FileSystemWriter(place.path)


def _over_fsspec(place: Place) -> Any:
    return peer("torch.distributed.checkpoint._fsspec_filesystem").FsspecWriter(f"s3://{place.path}", **s3_options())


def _over_connector(place: Place) -> Any:
    from benchmarks.cases.s3_connector import dcp_writer

    return dcp_writer(place)


class _Blocking(StallCase):
    writer: ClassVar[Writer]

    def save(self, state: State, repetition: int) -> Handle:
        dcp.save(state, storage_writer=type(self).writer(self.place / str(repetition)), no_dist=True)
        return Done()


class _Async(StallCase):
    """async_save in a thread."""

    writer: ClassVar[Writer]

    def save(self, state: State, repetition: int) -> Handle:
        return self._future(
            dcp.async_save(state, storage_writer=type(self).writer(self.place / str(repetition)), no_dist=True)
        )

    @staticmethod
    def _future(made: Any) -> Future[Any]:
        found: Future[Any] = getattr(made, "upload_completion", made)
        return found


class _AsyncProcess(_Async):
    """async_save in a process, which needs a process group."""

    children = True

    def prepare(self, state: State) -> None:
        dist = peer("torch.distributed")
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        if not dist.is_initialized():
            store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
            os.environ["MASTER_PORT"] = str(store.port)
            dist.init_process_group("gloo", store=store, rank=0, world_size=1)

    def save(self, state: State, repetition: int) -> Handle:
        kinds = peer("torch.distributed.checkpoint.state_dict_saver").AsyncCheckpointerType
        writer = type(self).writer(self.place / str(repetition))
        return self._future(dcp.async_save(state, storage_writer=writer, async_checkpointer_type=kinds.PROCESS))


class _AsyncStaged(_Async):
    """async_save with DCP's newer stager, into shared memory."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        staging = peer("torch.distributed.checkpoint.staging")
        options = staging.StagingOptions(
            use_pinned_memory=False, use_shared_memory=True, use_async_staging=True, use_non_blocking_copy=False
        )
        self._stager = staging.DefaultStager(options)

    def save(self, state: State, repetition: int) -> Handle:
        writer = type(self).writer(self.place / str(repetition))
        made: Any = dcp.async_save(state, storage_writer=writer, no_dist=True, async_stager=self._stager)
        made.staging_completion.result()  # the weights may change only after this
        return self._future(made)


class _CloneThenThread(StallCase):
    """What Lightning's AsyncCheckpointIO does: clone every tensor, then its plain save in a thread."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._pool = ThreadPoolExecutor(1)

    def save(self, state: State, repetition: int) -> Handle:
        from benchmarks.cases.frameworks import lightning_save

        cloned = torch.utils._pytree.tree_map(  # noqa: SLF001 - what Lightning's own does
            lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, state
        )
        return self._pool.submit(lightning_save, cloned, f"s3://{self.place.path}/{repetition}")


class _TorchSave(StallCase):
    def save(self, state: State, repetition: int) -> Handle:
        folder = Path(self.place.path)
        folder.mkdir(exist_ok=True)
        torch.save(state, folder / str(repetition))
        return Done()


def _enter_stalls() -> None:
    table: list[tuple[str, type[StallCase], Writer | None, str]] = [
        ("torch_save", _TorchSave, None, "stall-local"),
        ("dcp_async_thread", _Async, _local, "stall-local"),
        ("dcp_async_process", _AsyncProcess, _local, "stall-local"),
        ("dcp_async_staged", _AsyncStaged, _local, "stall-local"),
        ("dcp_save_fsspec", _Blocking, _over_fsspec, "stall-s3"),
        ("lightning_async", _CloneThenThread, None, "stall-s3"),
        ("dcp_async_thread_fsspec", _Async, _over_fsspec, "stall-s3"),
        ("dcp_async_process_fsspec", _AsyncProcess, _over_fsspec, "stall-s3"),
        ("dcp_async_staged_fsspec", _AsyncStaged, _over_fsspec, "stall-s3"),
        ("dcp_async_thread_s3torchconnector", _Async, _over_connector, "stall-s3"),
        ("dcp_async_staged_s3torchconnector", _AsyncStaged, _over_connector, "stall-s3"),
    ]
    for name, base, writer, group in table:
        fields: dict[str, Any] = {} if writer is None else {"writer": staticmethod(writer)}
        case(group, "peer", name=name)(type(name, (base,), fields))


_enter_stalls()
