"""What each role does in its working life, told so that whatever it is not permitted to do is noticed.

Each story gives the problems it met: errors, and what was left behind. The whole of its rights gives none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import cloudckpt
from cloudckpt import CheckpointManager, Settings
from cloudckpt.core import keys
from cloudckpt.core import manifest as transitions
from cloudckpt.core.model import Checkpoint, Manifest, Owner, State
from cloudckpt.core.policy import Policy
from cloudckpt.editing import remove
from cloudckpt.errors import CloudCkptError
from cloudckpt.tools import gc, open_store

PART = 5 * 1024 * 1024
#: The step of the save whose process was killed.
KILLED = 7
PAYLOAD = keys.payload_name("model", 0, 1)


def settings(*, direct: bool = True) -> Settings:
    """Small parts, a copy of every third manifest, and no patience."""
    return Settings(
        part_size_bytes=PART,
        direct_lane=direct,
        copy_every_revisions=3,
        retry_base_s=0.01,
        retry_cap_s=0.05,
        manifest_deadline_s=5,
        storage_deadline_s=5,
        request_timeout_s=20,
    )


def state_of(step: int, *, parts: bool = False) -> dict[str, Any]:
    """Two components; with ``parts`` one of them is larger than a part, and goes up in an upload in parts."""
    return {
        "model": {"w": torch.full((3 * PART // 8 if parts else 3000,), float(step))},
        "optimizer": {"m": torch.full((10,), float(step))},
    }


def kill_a_save(root: str) -> str:
    """Claim a run and announce a save, as a process does that is killed in its upload; its payload object's key."""
    store = open_store(root)
    owner = Owner(token=store.token(16), host="node-1", pid=4711, run_key=None, claimed_at=store.clock())
    policy = Policy(keep_last=1)
    run = Manifest(run_id=store.token(32), policy=policy)
    store.transact(
        lambda current, _: transitions.claim(
            current, owner, policy=policy, settlements={}, takeover="last_wins", at=store.clock()
        ),
        prepare=lambda _: None,
        new=lambda: run,
    )
    entry = Checkpoint(
        id=store.token(8), step=KILLED, seq=0, state=State.PENDING, writer_epoch=1, announced_at="", object_count=2
    )
    store.transact(
        lambda current, _: transitions.announce(
            current, entry, writer_epoch=1, settlements={}, gone=(), at=store.clock()
        ),
        prepare=lambda _: None,
    )
    store.storage.close()
    return keys.payload_key(entry.step, entry.id, PAYLOAD)


def prepare_for_sweeping(root: str) -> str:
    """A run with a retired checkpoint whose bytes are there, and an orphan; the key of an upload nobody knows of."""
    with CheckpointManager(root, settings=settings(), keep_last=3) as ckpts:
        for step in (1, 2):
            ckpts.save(step, state_of(step), block=True)
    store = open_store(root)
    remove(store, [1])
    store.storage.put(keys.payload_key(8, "0000beef", PAYLOAD), [b"orphan"], size_bytes=6)
    store.storage.close()
    return keys.payload_key(9, "0000cafe", PAYLOAD)


def train(root: str, options: Mapping[str, object], *, direct: bool = True) -> list[str]:
    """Go on after a killed save: claim, save in parts, let retention delete, restore, prune."""
    words: dict[str, Any] = {"storage_options": options, "settings": settings(direct=direct)}
    problems: list[str] = []
    try:
        with CheckpointManager(root, **words, keep_last=1) as ckpts:
            for step in (11, 12, 13):
                # One upload in parts asks for whatever three would.
                ckpts.save(step, state_of(step, parts=step == 13), block=True)
            ckpts.prune()
        state = state_of(0, parts=True)
        with CheckpointManager(root, **words) as ckpts:
            resumed = ckpts.restore(state)
        if resumed is None or resumed.step != 13 or not (state["model"]["w"] == 13).all():
            problems.append(f"restored {resumed}")
    except CloudCkptError as exc:
        problems.append(f"{type(exc).__name__}: {exc}")
    return problems


def read(root: str, options: Mapping[str, object], *, direct: bool = True) -> list[str]:
    """Load a checkpoint, and find out that there is no run in another place below the prefix."""
    problems: list[str] = []
    try:
        run = cloudckpt.open(root, storage_options=options, settings=settings(direct=direct))
        loaded = run.load("latest")
        if not torch.equal(loaded["model"]["w"], state_of(2)["model"]["w"]):
            problems.append("loaded something else")
        if open_store(f"{root}/nothing-yet", storage_options=options, settings=settings()).read() is not None:
            problems.append("there is a run where nobody made one")
    except CloudCkptError as exc:
        problems.append(f"{type(exc).__name__}: {exc}")
    return problems


def sweep(root: str, options: Mapping[str, object], *, direct: bool = True) -> list[str]:
    """Collect the garbage: retired bytes, orphans, unfinished uploads."""
    del direct  # gc sends no payload
    try:
        report = gc(root, dry_run=False, storage_options=options)
    except CloudCkptError as exc:
        return [f"{type(exc).__name__}: {exc}"]
    problems = [f"{key}: {why}" for key, why in report.failed.items()]
    if [checkpoint.step for checkpoint in report.retired] != [1] or report.aborted_uploads != 1:
        problems.append(f"not everything was swept: {report.retired}, {report.aborted_uploads} uploads aborted")
    return problems


def left_behind(root: str) -> list[str]:
    """What somebody with the rights of the environment finds that no entry of the manifest names."""
    store = open_store(root)
    manifest = store.read()
    names = {entry.name for entry in manifest.committed} if manifest else set()
    listed = {item.key for item in store.storage.list("")}
    store.storage.close()
    found = {key for key in listed if key.partition("/")[0] not in {*names, keys.MANIFEST}}
    copies = {keys.manifest_copy(revision) for revision in manifest.copies} if manifest else set()
    return sorted(found - copies)
