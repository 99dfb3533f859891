"""Which ranks save together, and how they find rank zero: the only use that is made of ``torch.distributed``."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from cloudckpt.coordination.channel import Meeting
from cloudckpt.errors import ConfigError, RankError

__all__ = ["Group", "find_group"]

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
#: How many managers, and guards, of each group this process has made: the n-th ones of all ranks belong together.
_MADE: Counter[str] = Counter()


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The ranks that save together.

    Attributes:
        rank: this process's number among them.
        ranks: their numbers in the whole job.
        store: the key-value store of the job, which hands over one address.
    """

    rank: int
    ranks: tuple[int, ...]
    store: Any

    @property
    def world_size(self) -> int:
        """How many they are."""
        return len(self.ranks)

    def next_key(self, whose: str = "manager") -> str:
        """Under which the next channel of this group is found, on every rank the same.

        Args:
            whose: what the channel is for. Each kind is counted by itself: a rank that has made one thing more than
                the others must not make them meet in the wrong places.
        """
        members = hashlib.sha256(",".join(map(str, self.ranks)).encode()).hexdigest()[:12]
        name = f"{members}/{whose}"
        _MADE[name] += 1
        return f"cloudckpt/{name}/{_MADE[name]}"

    def announce(self, key: str, meeting: Meeting | BaseException) -> None:
        """On rank zero: say where the others find it, or why they will not."""
        if isinstance(meeting, Meeting):
            said: dict[str, object] = {"hosts": meeting.hosts, "port": meeting.port, "token": meeting.token}
        else:
            said = {"failed": str(meeting)}
        self.store.set(key, json.dumps(said))

    def find(self, key: str, timeout_s: float) -> Meeting:
        """On the others: where rank zero is.

        Raises:
            RankError: it has not said so in time, or cannot.
        """
        try:
            self.store.wait([key], timedelta(seconds=timeout_s))
            said = json.loads(self.store.get(key))
        except (RuntimeError, ValueError) as exc:  # torch's DistError is a RuntimeError
            raise RankError(
                f"rank 0 of {self.world_size} has not said within {timeout_s:g} s where it is: every rank must use a "
                f"CheckpointManager of its own, and a PreemptionGuard if any does, rank 0 as well ({exc})"
            ) from exc
        if "failed" in said:
            raise RankError(f"rank 0 cannot be met: {said['failed']}")
        return Meeting(hosts=tuple(said["hosts"]), port=int(said["port"]), token=str(said["token"]))


def find_group(process_group: Any) -> Group | None:
    """The ranks that save together; None if this process saves alone.

    Args:
        process_group: as given to the manager: None for all ranks of the job, False for this process alone.

    Raises:
        ConfigError: this process is not in the group, or the job is not initialised.
    """
    if process_group is False:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        if process_group is not None:
            raise ConfigError("process_group: torch.distributed is not initialised; call init_process_group() first")
        _refuse_uninitialised(os.environ)
        return None
    rank = dist.get_rank(process_group)
    if rank < 0:
        raise ConfigError(
            f"rank {dist.get_rank()} is not in the given process_group: make the CheckpointManager only on its ranks"
        )
    ranks = tuple(dist.get_process_group_ranks(process_group or dist.group.WORLD))
    if len(ranks) == 1:
        return None
    store = dist.distributed_c10d._get_default_store()  # noqa: SLF001 - torch has no public way; it is as old as 1.7
    return Group(rank=rank, ranks=ranks, store=store)


def _refuse_uninitialised(environment: Mapping[str, str]) -> None:
    world_size, rank = environment.get("WORLD_SIZE", ""), environment.get("RANK", "")
    if world_size.isdecimal() and rank.isdecimal() and int(world_size) > 1:
        raise ConfigError(
            f"this is rank {rank} of {world_size}, and torch.distributed is not initialised: call "
            "init_process_group() before the CheckpointManager, so that the ranks save together. If each of them is "
            "a run of its own, pass process_group=False and another root to each"
        )


def new_token() -> str:
    """What proves that somebody belongs to the job."""
    return secrets.token_hex(16)


def own_addresses(environment: Mapping[str, str] = os.environ) -> tuple[str, Sequence[str]]:
    """Where to listen on this machine, and at which addresses the others may find it, the likeliest first."""
    master = environment.get("MASTER_ADDR", "")
    local, world = environment.get("LOCAL_WORLD_SIZE"), environment.get("WORLD_SIZE")
    if master in _LOOPBACK or (local is not None and local == world):
        return "127.0.0.1", ["127.0.0.1"]
    found: list[str] = []
    if master:
        # The address of the interface through which rank zero of the job is reached.
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((master, 9))
            found.append(probe.getsockname()[0])
    with contextlib.suppress(OSError):
        found += [str(item[4][0]) for item in socket.getaddrinfo(socket.gethostname(), None)]
    found += [socket.getfqdn(), socket.gethostname()]
    if not master:  # started by hand on one machine, for all that is known
        found.append("127.0.0.1")
    return "", [*dict.fromkeys(address for address in found if address)]
