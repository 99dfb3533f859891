"""A save against a deadline: what is in flight first, then a new one if it fits, and its end at the deadline."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from cloudckpt.coordination import Coordinator
from cloudckpt.core.deadline import REMEMBERED, Judgement, Pace, View, judge
from cloudckpt.errors import ConflictError, RankError, SaveError
from cloudckpt.pending import PendingSave
from cloudckpt.saving.job import SaveRequest
from cloudckpt.tensors.forecast import expected_share
from cloudckpt.tensors.planning import Planner

__all__ = ["Hurrying", "see_through"]

#: How long the end of a save that its deadline has broken off is waited for: the request under way, and its abort.
_LAST_WORD_S = 5.0


class Hurrying:
    """Knows how long saves take on this rank, and agrees with the others on whether one more fits.

    Args:
        planner: this rank's.
        coordinator: the other ranks.
    """

    def __init__(self, planner: Planner, coordinator: Coordinator) -> None:
        self._planner = planner
        self._coordinator = coordinator
        self._paces: deque[Pace] = deque(maxlen=REMEMBERED)

    def note(self, size_bytes: int, seconds: float) -> None:
        """A save of this size, of all ranks together, was committed."""
        self._paces.append(Pace(size_bytes=size_bytes, seconds=seconds))

    def judge(self, request: SaveRequest, until: float, last: PendingSave | None) -> Judgement:
        """Whether a save that has to be committed by a moment is begun. Collective. The save in flight comes first.

        An earlier save that failed does not keep this one from being made, and is still to be told afterwards; unless
        this process was replaced, or a rank is gone.

        Args:
            until: the moment, by ``time.monotonic``.
            last: the save before.

        Raises:
            TypeError: the state holds something that cannot be stored.
            SaveError: the same, on any rank of many; or a rank is gone.
            ConflictError: a newer writer owns the run.
        """
        word: bytes | BaseException
        try:
            word = self._view(request, until, last).to_bytes()
        except BaseException as exc:  # noqa: BLE001 - goes to all ranks, and is raised on each
            word = exc

        def judged(words: Sequence[bytes]) -> list[bytes]:
            return [judge([*map(View.from_bytes, words)]).to_bytes()] * len(words)

        return Judgement.from_bytes(self._coordinator.exchange("save-deadline", word, judged, patient=True))

    def _view(self, request: SaveRequest, until: float, last: PendingSave | None) -> View:
        busy = "" if last is None else _finished(last, until)
        size_bytes, paces = 0, tuple(self._paces)
        if paces and not busy:
            size_bytes = self._size_bytes(request)
        return View(left_s=until - time.monotonic(), size_bytes=size_bytes, paces=paces, busy=busy)

    def _size_bytes(self, request: SaveRequest) -> int:
        """About how many bytes this rank would put."""
        ranks = self._coordinator.world_size
        if ranks == 1:
            return self._planner.plan(request.state, allow_pickle=request.allow_pickle).size_bytes
        share, _ = expected_share(self._planner.look(request.state, allow_pickle=request.allow_pickle), ranks)
        return share


def _finished(last: PendingSave, until: float) -> str:
    """Wait for the save in flight; its name if it is still on its way at the deadline."""
    if not last.wait_quietly(max(0.0, until - time.monotonic())):
        return last.checkpoint.name
    if isinstance(last.failure, RankError | ConflictError):
        last.wait()
    return ""


def see_through(pending: PendingSave, until: float) -> PendingSave:
    """Wait until a save is committed; at its deadline, send nothing more of it.

    Args:
        until: the deadline, by ``time.monotonic``.

    Raises:
        SaveError: it was not committed in time, or failed.
        ConflictError: a newer writer owns the run.
    """
    try:
        ended = pending.wait_quietly(max(0.0, until - time.monotonic()))
        if not ended:
            pending.break_off("its deadline has come")
            ended = pending.wait_quietly(_LAST_WORD_S)
    except BaseException:
        pending.break_off("the call that saves was interrupted")
        raise
    if ended:
        pending.wait()
        return pending
    pending.mark_seen()
    raise SaveError(
        f"{pending.checkpoint.url} was not committed by its deadline, and its last request has not ended yet. Earlier "
        "checkpoints are untouched; the next start completes this one if all of it is there, and drops it otherwise"
    )
