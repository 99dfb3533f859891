"""What is saved, and under which id: at once for a process alone, by one or two exchanges for many."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cloudckpt.coordination import Coordinator
from cloudckpt.saving.job import SaveRequest
from cloudckpt.tensors.planning import Plan, Planner
from cloudckpt.tensors.sharing import Offer, Share

__all__ = ["agree"]

_SAME, _ANEW = b"=", b"!"


def agree(
    request: SaveRequest,
    planner: Planner,
    coordinator: Coordinator,
    *,
    new_id: Callable[[], str],
    ready: Callable[[], None],
) -> tuple[str, Plan]:
    """The save's id, and what this rank writes of it. Collective.

    In the steady state a rank says one number, and is answered the id. Where any rank's state has other tensors, shapes
    or places than at the last save, all of them say what they have, and rank zero divides the work anew.

    Args:
        new_id: makes an id, on rank zero.
        ready: called first; raises what keeps this rank from saving.

    Raises:
        CloudCkptError: any rank cannot save this state; the same on every rank.
    """
    if coordinator.world_size == 1:
        ready()
        return new_id(), planner.plan(request.state, allow_pickle=request.allow_pickle)
    word: bytes | BaseException
    try:
        ready()
        look = planner.look(request.state, allow_pickle=request.allow_pickle)
        word = planner.token(look)
    except BaseException as exc:  # noqa: BLE001 - goes to all ranks, and is raised on each
        word = exc

    def answer(words: Sequence[bytes]) -> list[bytes]:
        same = words[0] and len(set(words)) == 1
        return [new_id().encode() + (_SAME if same else _ANEW)] * len(words)

    said = coordinator.exchange("save", word, answer)
    save_id, anew = said[:-1].decode(), said[-1:] == _ANEW
    if not anew:
        return save_id, planner.settle(look, None)
    try:
        word = look.offer().to_bytes()
    except BaseException as exc:  # noqa: BLE001 - as above
        word = exc

    def divided(words: Sequence[bytes]) -> list[bytes]:
        return [share.to_bytes() for share in planner.divide([*map(Offer.from_bytes, words)])]

    share = Share.from_bytes(coordinator.exchange("save-plan", word, divided))
    return save_id, planner.settle(look, share)
