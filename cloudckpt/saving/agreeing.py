"""What is saved, and under which id: at once for a process alone, by one to three exchanges for many."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cloudckpt.coordination import Coordinator
from cloudckpt.errors import StateMismatchError
from cloudckpt.saving.job import SaveRequest
from cloudckpt.tensors.planning import Look, Plan, Planner
from cloudckpt.tensors.replicas import differing, digest_of, sums_of
from cloudckpt.tensors.sharing import Offer, Share

__all__ = ["Agreement"]

#: What rank zero answers to what the ranks say of their state: go on as before, show the sums, plan anew.
_SAME, _SHOW, _ANEW = b"=", b"?", b"!"


@dataclass(slots=True)
class Agreement:
    """How the ranks agree on each save.

    In the steady state a rank says one number and one digest, and is answered the save's id: less than 64 bytes each
    way. Where any rank's state has other tensors, shapes or places than at the last save, all of them say what they
    have, and rank zero divides the work anew.

    Args:
        planner: this rank's.
        coordinator: the other ranks.
        new_id: makes an id, on rank zero.
        warn: told what people should know, on rank zero.
        check_replicas: how to look whether what several ranks have is the same: "sample", "full" or "off".
    """

    planner: Planner
    coordinator: Coordinator
    new_id: Callable[[], str]
    warn: Callable[[str], None]
    check_replicas: str
    _turn: int = field(default=0)

    def reach(self, request: SaveRequest, *, ready: Callable[[], None]) -> tuple[str, Plan]:
        """The save's id, and what this rank writes of it. Collective.

        Args:
            ready: called first; raises what keeps this rank from saving.

        Raises:
            CloudCkptError: any rank cannot save this state, or the ranks' copies of it differ; on every rank.
        """
        if self.coordinator.world_size == 1:
            ready()
            return self.new_id(), self.planner.plan(request.state, allow_pickle=request.allow_pickle)
        self._turn += 1
        word: bytes | BaseException
        try:
            ready()
            look = self.planner.look(request.state, allow_pickle=request.allow_pickle)
            word = self._word(look)
        except BaseException as exc:  # noqa: BLE001 - goes to all ranks, and is raised on each
            word = exc
        said = self.coordinator.exchange("save", word, self._answer, patient=True)
        save_id, what = said[:-1].decode(), said[-1:]
        share = self._planned_anew(look) if what == _ANEW else None
        plan = self.planner.settle(look, share)
        if what == _SHOW or (what == _ANEW and self.check_replicas != "off"):
            self._compare(look)
        return save_id, plan

    def _word(self, look: Look) -> bytes:
        token = self.planner.token(look)
        return token + b" " + digest_of(self._sums(look)) if token else b""

    def _answer(self, words: Sequence[bytes]) -> list[bytes]:
        tokens, digests = zip(*(word.partition(b" ")[::2] for word in words), strict=True)
        what = _ANEW
        if tokens[0] and len(set(tokens)) == 1:
            # Ranks that share the same tensors look at the same ones; those that share others, at others.
            groups = set(zip(self.planner.groups, digests, strict=True))
            agree = len(groups) == len({group for group, _ in groups})
            what = _SAME if agree and not self.planner.mixed else _SHOW
        return [self.new_id().encode() + what] * len(words)

    def _planned_anew(self, look: Look) -> Share:
        word: bytes | BaseException
        try:
            word = look.offer().to_bytes()
        except BaseException as exc:  # noqa: BLE001 - goes to all ranks, and is raised on each
            word = exc

        def divided(words: Sequence[bytes]) -> list[bytes]:
            return [share.to_bytes() for share in self.planner.divide([*map(Offer.from_bytes, words)])]

        share = Share.from_bytes(self.coordinator.exchange("save-plan", word, divided))
        if self.coordinator.rank == 0:
            for remark in self.planner.remarks:
                self.warn(remark)
        return share

    def _sums(self, look: Look) -> dict[str, int]:
        if self.check_replicas == "off":
            return {}
        return sums_of(self.planner.replicas(look), self.check_replicas, self._turn)

    def _compare(self, look: Look) -> None:
        """Compare the sums one by one, so that what differs can be named."""
        word: bytes | BaseException
        try:
            word = json.dumps(self._sums(look)).encode()
        except BaseException as exc:  # noqa: BLE001 - goes to all ranks, and is raised on each
            word = exc
        self.coordinator.exchange("save-replicas", word, _compared)


def _compared(words: Sequence[bytes]) -> list[bytes]:
    if found := differing([json.loads(word) for word in words]):
        raise StateMismatchError(
            "the ranks have different values for what is stored once: "
            f"{'; '.join(found)}. Broadcast it from rank 0 before training, declare it PerRank(...), or save it "
            'unchecked with Settings(check_replicas="off")'
        )
    return [b""] * len(words)
