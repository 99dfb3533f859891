"""Whole checkpoint libraries: Lightning, TorchSnapshot, Orbax, Run:ai's streamer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.cases.base import Handle, Place, StallCase, case, peer, s3_options
from benchmarks.state import State, tensors

__all__ = ["lightning_save"]


def lightning_save(state: State, url: str) -> None:
    """What Lightning's Fabric and Trainer save with."""
    peer("fsspec.config").conf["s3"] = s3_options()
    peer("lightning_fabric.utilities.cloud_io")._atomic_save(state, url)  # noqa: SLF001 - what its users reach


def _arrays(state: State) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in tensors(state).items() if tensor.dim()}


@case("save-local", "peer")
def lightning(state: State, place: Place) -> None:
    """Its atomic save to a file."""
    lightning_save(state, place.path)


@case("save-s3", "peer", name="lightning")
def _lightning_s3(state: State, place: Place) -> None:
    """Its atomic save through s3fs."""
    lightning_save(state, f"s3://{place.path}")


@case("load-s3", "peer", name="lightning")
def _lightning_load(state: State, place: Place) -> State:
    """Its load through s3fs."""
    peer("fsspec.config").conf["s3"] = s3_options()
    load = peer("lightning_fabric.utilities.cloud_io")._load  # noqa: SLF001 - what its users reach
    found: State = load(f"s3://{place.path}/pt", weights_only=True)
    return found


@case("save-local", "peer")
def torchsnapshot(state: State, place: Place) -> None:
    """Snapshot.take to a folder."""
    library = peer("torchsnapshot")
    library.Snapshot.take(place.path, {"state": library.StateDict(**state)})


@case("save-local", "peer")
def orbax(state: State, place: Place) -> None:
    """PyTreeCheckpointer on NumPy arrays."""
    with peer("orbax.checkpoint").PyTreeCheckpointer() as checkpointer:
        checkpointer.save(place.path, _arrays(state))


@case("stall-local", "peer", name="torchsnapshot_async")
class SnapshotAsync(StallCase):
    """Snapshot.async_take to a folder."""

    def save(self, state: State, repetition: int) -> Handle:
        library = peer("torchsnapshot")
        path = f"{self.place.path}/{repetition}"
        pending = library.Snapshot.async_take(path, {"state": library.StateDict(**state)})
        return ThreadPoolExecutor(1).submit(pending.wait)


@case("stall-local", "peer", name="orbax_async")
class OrbaxAsync(StallCase):
    """AsyncCheckpointer on NumPy arrays."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        library = peer("orbax.checkpoint")
        self._checkpointer = library.AsyncCheckpointer(library.PyTreeCheckpointHandler())

    def save(self, state: State, repetition: int) -> Handle:
        self._checkpointer.save(f"{self.place.path}/{repetition}", _arrays(state))
        return ThreadPoolExecutor(1).submit(self._checkpointer.wait_until_finished)


@case("load-s3", "peer")
def runai_streamer(state: State, place: Place) -> State:
    """SafetensorsStreamer into new tensors."""
    with peer("runai_model_streamer").SafetensorsStreamer() as streamer:
        streamer.stream_file(f"s3://{place.path}/st.safetensors")
        return dict(streamer.get_tensors())
