"""A rank is killed, again and again: how soon the others say so."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

import pytest

import cloudckpt
from tests.distributed import kills
from tests.distributed.ranks import Ranks

pytestmark = [pytest.mark.processes, pytest.mark.slow]

RANKS = 3
ROUNDS = 20


@pytest.mark.timeout(1200)
def test_survivors_name_a_killed_rank_each_time(tmp_path: Path) -> None:
    """Whoever dies, and whenever: every survivor names it, and nothing is committed. ``-s`` prints how soon."""
    times: dict[str, list[float]] = {moment: [] for moment in kills.MOMENTS}
    # Each moment meets each rank: three and four have no common divisor.
    turns = zip(itertools.cycle(kills.MOMENTS), itertools.cycle(range(RANKS)), range(ROUNDS), strict=False)
    for moment, victim, number in turns:
        root, note = tmp_path / f"run-{number}", tmp_path / f"died-{number}"
        ranks = Ranks(RANKS)
        try:
            outcomes = ranks.run(kills.die, root=str(root), victim=victim, moment=moment, note=str(note))
        finally:
            ranks.close()
        assert [outcome.gone for outcome in outcomes] == [rank == victim for rank in range(RANKS)]
        for outcome in outcomes:
            if not outcome.gone:
                assert outcome.error is None, outcome.error
                assert f"rank {victim} (" in outcome.value["said"], (moment, outcome.value)
                assert "is gone" in outcome.value["said"], (moment, outcome.value)
                times[moment].append(outcome.value["heard"] - float(note.read_text()))
        assert [c.step for c in cloudckpt.open(root).checkpoints()] == [0], moment
    print(f"\n{ROUNDS} kills of one of {RANKS} ranks; ms from SIGKILL until a survivor's call has raised")
    for moment, found in [*times.items(), ("all", [*itertools.chain(*times.values())])]:
        print(f"{moment:>10}: median {1000 * statistics.median(found):.1f}, max {1000 * max(found):.1f}")
