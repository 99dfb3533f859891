"""Finding the latest and the best among many retained checkpoints: by a manifest, and by looking around."""

from __future__ import annotations

import json
import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cloudckpt
from cloudckpt import Best, Policy
from cloudckpt.core.manifest_json import encode_manifest
from cloudckpt.testing import builders

from benchmarks.cases.base import CASES, Case, Place, case, s3_options
from benchmarks.cases.s3_clients import boto3_client, s3fs_filesystem
from benchmarks.meter import Meter
from benchmarks.sink.process import statistics_of
from benchmarks.state import State

__all__ = ["measure_discovery"]

_TIMES = 3
_WRITERS = 16


def _loss_of(step: int) -> float:
    return step * 7919 % 10007 / 10007


def _name(step: int) -> str:
    return f"step-{step:010d}"


def _fill(place: Place, count: int) -> None:
    """A run of so many retained checkpoints: its manifest, and for those who look around a small file each."""
    client = boto3_client()
    there = client.list_objects_v2(Bucket=place.bucket, Prefix=f"{place.key}/manifest.json", MaxKeys=1)
    if there["KeyCount"]:
        return
    policy = Policy(keep_last=None, keep_best=(Best("loss", "min", 1),))
    entries = [builders.checkpoint(step, metrics={"loss": _loss_of(step)}) for step in range(1, count + 1)]
    body = encode_manifest(builders.manifest(*entries, policy=policy))

    def put(step: int) -> None:
        told = json.dumps({"step": step, "loss": _loss_of(step)}).encode()
        client.put_object(Bucket=place.bucket, Key=f"{place.key}/others/{_name(step)}/metadata.json", Body=told)

    with ThreadPoolExecutor(_WRITERS) as pool:
        list(pool.map(put, range(1, count + 1)))
    client.put_object(Bucket=place.bucket, Key=f"{place.key}/manifest.json", Body=body)


class _Question(Case):
    """Asked by a process that has its connections, but has seen nothing of the run."""

    def run(self, state: State, repetition: int) -> State | None:
        return {"step": self.answer()}

    def answer(self) -> int:
        raise NotImplementedError("each question answers for itself")


class _Reader(_Question):
    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._run = cloudckpt.open(f"s3://{place.path}", storage_options=s3_options())


@case("discover", "ours", name="cloudckpt_latest")
class Latest(_Reader):
    """latest() by the manifest."""

    def answer(self) -> int:
        found = self._run.latest()
        return found.step if found else -1


@case("discover", "ours", name="cloudckpt_best")
class BestOne(_Reader):
    """best() by the manifest."""

    def answer(self) -> int:
        found = self._run.best()
        return found.step if found else -1


@case("discover", "peer", name="latest_boto3_list")
class ListLatest(_Question):
    """The last common prefix of every page of a listing."""

    def answer(self) -> int:
        pages = boto3_client().get_paginator("list_objects_v2")
        prefix = f"{self.place.key}/others/"
        asked = pages.paginate(Bucket=self.place.bucket, Prefix=prefix, Delimiter="/")
        last = max(found["Prefix"] for page in asked for found in page.get("CommonPrefixes", ()))
        return int(last.rstrip("/").rpartition("-")[2])


@case("discover", "peer", name="latest_s3fs_ls")
class LsLatest(_Question):
    """The last name that ls() gives."""

    def answer(self) -> int:
        names = s3fs_filesystem().ls(f"{self.place.path}/others", detail=False, refresh=True)
        return int(max(names).rpartition("-")[2])


@case("discover", "peer", name="best_s3fs_read_each")
class ReadEach(_Question):
    """A metadata file of each, read at once with cat()."""

    def answer(self) -> int:
        found = s3fs_filesystem()
        names = found.ls(f"{self.place.path}/others", detail=False, refresh=True)
        told = found.cat([f"{name}/metadata.json" for name in names])
        return int(min((json.loads(body) for body in told.values()), key=lambda each: each["loss"])["step"])


def measure_discovery(name: str, size: str, place: Place) -> dict[str, Any]:
    """The median time of an answer, and what one answer asks of the store.

    Raises:
        ValueError: the answer is wrong.
    """
    count = int(size)
    here = place / size
    _fill(here, count)
    url = os.environ["AWS_ENDPOINT_URL"]
    steps = range(1, count + 1)
    right = min(steps, key=_loss_of) if "best" in name else count
    question = CASES["discover"][name](here)
    if not isinstance(question, _Question):
        raise TypeError(f"{name} is no question")
    question.answer()  # connections
    before = statistics_of(url)
    walls, cpus = [], []
    for _ in range(_TIMES):
        with Meter() as meter:
            found = question.answer()
        walls.append(meter.wall_s)
        cpus.append(meter.cpu_s)
    if found != right:
        raise ValueError(f"{name} answered {found}, which is not {right}")
    asked = statistics_of(url).since(before)
    return {
        "bytes": 0,
        "wall_s": statistics.median(walls),
        "cpu_s": statistics.median(cpus),
        "peak_bytes": 0,
        "requests": {kind: number / _TIMES for kind, number in asked.requests.items()},
    }
