"""What is in a checkpoint of another program, and what each file of it becomes. Reads names and small JSON only."""

from __future__ import annotations

import fnmatch
import json
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloudckpt.core import keys
from cloudckpt.core.model import Checkpoint
from cloudckpt.errors import ConfigError, FormatError
from cloudckpt.storage.local_errors import mapped
from cloudckpt.storage.pulled import PULLED_NAME, is_pulled, read_note

__all__ = ["OURS", "ImportPart", "ImportPlan", "Imported", "check_given", "plan_import"]

#: The kind of a folder that ``pull`` made.
OURS = "cloudckpt"

_FOLDER = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_STEP = re.compile(r"step=(\d+)")
_RNG = re.compile(r"rng_state_(\d+)\.pth")
_FORGATHER = re.compile(r"(.+?)_state((?:_(?:rank|group|node)_.+)?)\.pt")
_JSON_LIMIT_BYTES = 256 * 1024 * 1024

#: A Hugging Face Trainer's files -> components.
_HUGGING_FACE = {
    "optimizer.pt": "optimizer",
    "optimizer.bin": "optimizer",
    "scheduler.pt": "scheduler",
    "scaler.pt": "scaler",
    "rng_state.pth": "rng",
}
#: Weights, in the order in which they are looked for: where several lie side by side, later ones are often stale.
_WEIGHTS = (
    ("model.safetensors.index.json", "safetensors"),
    ("model.safetensors", "safetensors"),
    ("pytorch_model.bin.index.json", "torch"),
    ("pytorch_model.bin", "torch"),
)
_NOT_STATE = "not part of the training state"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportPart:
    """A component to be, and where it comes from.

    Attributes:
        component: its name.
        files: the files, by name.
        how: "safetensors", "torch" (a file of ``torch.save``) or "json".
    """

    component: str
    files: tuple[str, ...]
    how: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportPlan:
    """What a checkpoint of another program becomes.

    Attributes:
        path: the folder, or the file.
        kind: "huggingface", "lightning", "forgather", "cloudckpt" (one that was pulled) or "plain".
        step: as the folder tells it; None if only its contents do, or nobody does.
        metrics: as its own files tell them.
        parts: what becomes what. For "lightning" the file's own keys become the components.
        left_out: file -> why it is not imported.
    """

    path: Path
    kind: str
    step: int | None
    metrics: Mapping[str, float] = field(default_factory=dict)
    parts: tuple[ImportPart, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What an import made.

    Attributes:
        checkpoint: what it is in the run.
        plan: what came from where, and what was left out.
        components: what it has.
    """

    checkpoint: Checkpoint
    plan: ImportPlan
    components: tuple[str, ...]


def plan_import(path: str | os.PathLike[str], *, skip: Iterable[str] = ()) -> ImportPlan:
    """Look at a checkpoint of another program.

    Args:
        path: the folder, or a Lightning ``.ckpt`` file.
        skip: names of files to leave out; ``*`` and ``?`` stand for other characters.

    Raises:
        ConfigError: there is nothing of this name, or nothing in it that could be imported.
        FormatError: an index or a state file in it cannot be read.
        StorageError: the disk refused.
    """
    place = Path(path)
    if place.suffix == ".ckpt" and place.is_file():
        return _lightning(place, [place.name])
    if not place.is_dir():
        raise ConfigError(f"{place} is no folder with a checkpoint, and no .ckpt file")
    if is_pulled(str(place)):
        return ImportPlan(path=place, kind=OURS, step=None)
    with mapped(place):
        names = sorted(entry.name for entry in os.scandir(place) if entry.is_file())
    patterns = [*skip]
    skipped = {name: "skipped" for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}
    left = [name for name in names if name not in skipped]
    ckpts = [name for name in left if name.endswith(".ckpt")]
    if ckpts and not any(name in left for name, _ in _WEIGHTS):
        if len(ckpts) > 1:
            one = place / ckpts[0]
            raise ConfigError(f"{place} holds {len(ckpts)} checkpoints of Lightning: name one, such as {one}")
        return _lightning(place / ckpts[0], left, skipped)
    plan = _Folder(place, left, skipped).plan()
    if not plan.parts:
        raise ConfigError(
            f"{place} holds nothing that can be imported: there are {', '.join(names[:10]) or 'no files'}. Known "
            "are the folders of forgather, of Hugging Face's Trainer and of Lightning, and files in "
            ".safetensors, .pt, .pth, .bin and .json"
        )
    return plan


def check_given(plan: ImportPlan, *, step: int | None, metrics: Mapping[str, object] | None) -> None:
    """Refuse to be told what a pulled checkpoint knows by itself.

    Raises:
        ConfigError: a step or metrics were given for one.
    """
    if plan.kind == OURS and (step is not None or metrics):
        raise ConfigError(f"{plan.path} is a checkpoint that was pulled: it brings its own step and metrics")


def _lightning(path: Path, names: Iterable[str], skipped: Mapping[str, str] | None = None) -> ImportPlan:
    found = _STEP.search(path.name)
    others = {name: "beside the checkpoint" for name in names if name != path.name}
    return ImportPlan(
        path=path,
        kind="lightning",
        step=int(found[1]) if found else None,
        parts=(ImportPart(component="*", files=(path.name,), how="torch"),),
        left_out={**(skipped or {}), **others},
    )


class _Folder:
    """A folder's files, as they find their places."""

    def __init__(self, path: Path, names: Collection[str], left_out: Mapping[str, str]) -> None:
        self._path = path
        self._names = dict.fromkeys(names)
        self._left_out = dict(left_out)
        self._parts: list[ImportPart] = []
        self._metrics: dict[str, float] = {}
        match = _FOLDER.fullmatch(path.resolve().name)
        self._step = int(match[1]) if match else None

    def plan(self) -> ImportPlan:
        kind = self._kind()
        self._take_weights()
        take = {"huggingface": self._take_hugging_face, "forgather": self._take_forgather}.get(kind, self._take_plain)
        for name in [*self._names]:
            take(name)
        _check_components(self._path, self._parts)
        return ImportPlan(
            path=self._path,
            kind=kind,
            step=self._step,
            metrics=self._metrics,
            parts=tuple(self._parts),
            left_out=self._left_out,
        )

    def _kind(self) -> str:
        if "checkpoint_manifest.json" in self._names or any(map(_FORGATHER.fullmatch, self._names)):
            return "forgather"
        return "huggingface" if "trainer_state.json" in self._names else "plain"

    def _take(self, component: str, files: Iterable[str], how: str) -> None:
        self._parts.append(ImportPart(component=component, files=tuple(files), how=how))
        for name in files:
            self._names.pop(name, None)

    def _take_weights(self) -> None:
        found = next(((name, how) for name, how in _WEIGHTS if name in self._names), None)
        if found is None:
            return
        name, how = found
        files = [name]
        if name.endswith(".index.json"):
            files = self._shards(name)
            self._names.pop(name)
        self._take("model", files, how)
        for other, _ in _WEIGHTS:
            if other in self._names:
                shards = self._named_by(other) if other.endswith(".index.json") else []
                for copy in (other, *(shard for shard in shards if shard in self._names)):
                    self._leave_out(copy, f"another copy of the weights, beside {name}")

    def _shards(self, index: str) -> list[str]:
        shards = self._named_by(index)
        if not shards or any(Path(shard).name != shard for shard in shards):
            raise FormatError(f"{self._path / index} names no files beside it as its weights")
        if missing := [shard for shard in shards if not (self._path / shard).is_file()]:
            raise FormatError(f"{self._path / index} names {', '.join(missing[:5])}, which is not there")
        return shards

    def _named_by(self, index: str) -> list[str]:
        """What an index says that there is."""
        named = self._json(index).get("weight_map")
        return sorted(set(map(str, named.values()))) if isinstance(named, dict) else []

    def _json(self, name: str) -> dict[str, Any]:
        path = self._path / name
        with mapped(path):
            if path.stat().st_size > _JSON_LIMIT_BYTES:
                raise FormatError(f"{path} is larger than any that is known")
            body = path.read_bytes()
        try:
            found = json.loads(body)
        except ValueError as exc:
            raise FormatError(f"{path} is not valid JSON: {exc}") from exc
        if not isinstance(found, dict):
            raise FormatError(f"{path} is not a JSON object")
        return found

    def _leave_out(self, name: str, why: str) -> None:
        self._left_out[name] = why
        self._names.pop(name, None)

    def _take_hugging_face(self, name: str) -> None:
        if component := _HUGGING_FACE.get(name):
            self._take(component, [name], "torch")
        elif match := _RNG.fullmatch(name):
            self._take(f"rng_{match[1]}", [name], "torch")
        elif name == "trainer_state.json":
            self._note_trainer_state(self._json(name))
            self._take("trainer_state", [name], "json")
        elif name.endswith(".safetensors"):
            self._take(name.removesuffix(".safetensors"), [name], "safetensors")
        elif name == "training_args.bin":
            self._leave_out(name, "the Trainer's arguments, pickled: no state")
        else:
            self._leave_out(name, _NOT_STATE)

    def _note_trainer_state(self, state: Mapping[str, Any]) -> None:
        step = state.get("global_step")
        if type(step) is int and step >= 0:
            self._step = step
        history = state.get("log_history")
        for line in history if isinstance(history, list) else []:
            if isinstance(line, dict) and line.get("step") == self._step:
                self._metrics |= {n: v for n, v in _numbers(line).items() if n.startswith("eval_")}

    def _take_forgather(self, name: str) -> None:
        if match := _FORGATHER.fullmatch(name):
            self._take(f"{match[1]}{match[2]}", [name], "torch")
        elif name == "eval_metrics.json":
            self._metrics |= _numbers(self._json(name))
            self._leave_out(name, "read as the metrics")
        elif name == "checkpoint_manifest.json":
            self._leave_out(name, "the list of these files")
        else:
            self._take_plain(name)

    def _take_note(self, name: str) -> bool:
        """Whether it is what ``pull`` writes beside components: their step and metrics."""
        with mapped(self._path / name):
            noted = read_note((self._path / name).read_bytes())
        if noted is not None:
            self._step = noted.step
            self._metrics |= noted.metrics
        return noted is not None

    def _take_plain(self, name: str) -> None:
        stem, suffix = os.path.splitext(name)  # noqa: PTH122 - a name, and no path
        if name == PULLED_NAME and self._take_note(name):
            self._leave_out(name, "read as step and metrics")
        elif suffix == ".safetensors":
            self._take(stem, [name], "safetensors")
        elif suffix in {".pt", ".pth", ".bin"}:
            self._take(stem, [name], "torch")
        elif suffix == ".json":
            self._take(stem, [name], "json")
        else:
            self._leave_out(name, _NOT_STATE)


def _numbers(document: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in document.items()
        if type(value) in {int, float} and name not in {"step", "epoch"} and not math.isinf(value)
    }


def _check_components(path: Path, parts: Iterable[ImportPart]) -> None:
    seen: dict[str, ImportPart] = {}
    for part in parts:
        keys.payload_name(part.component, 0, 1)  # refuses what cannot be a name
        other = seen.setdefault(part.component.casefold(), part)
        if other is not part:
            raise ConfigError(
                f"{path}: {other.files[0]} and {part.files[0]} would both be the component {part.component!r}: leave "
                f"one out, with --skip {part.files[0]}"
            )
