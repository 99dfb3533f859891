"""A rank is killed, again and again: how soon the others say so."""

from __future__ import annotations

import itertools
import multiprocessing
import statistics
from pathlib import Path
from typing import Any

import pytest

import cloudckpt
from cloudckpt.testing.servers import free_ports
from tests.distributed import kills
from tests.records import Recording

pytestmark = [pytest.mark.processes, pytest.mark.slow]

RANKS = 3
ROUNDS = 20


def killed_once(words: dict[str, Any]) -> list[dict[str, Any] | None]:
    """What each rank of a new job answered; None from the one that died."""
    forks = multiprocessing.get_context("forkserver")  # torch is imported once, not by each of sixty processes
    forks.set_forkserver_preload([kills.__name__])
    (port,) = free_ports(1)
    job = []
    for rank in range(RANKS):
        answers, ours = forks.Pipe(duplex=False)
        process = forks.Process(target=kills.be_rank, args=(rank, RANKS, port, ours, words))
        process.start()
        ours.close()
        job.append((process, answers))
    found: list[dict[str, Any] | None] = []
    try:
        for rank, (_, answers) in enumerate(job):
            assert answers.poll(90), f"rank {rank} has not answered"
            try:
                found.append(answers.recv())
            except EOFError:
                found.append(None)
            answers.close()
    finally:
        for process, _ in job:
            process.kill()
            process.join()
            process.close()
    return found


@pytest.mark.timeout(600)
def test_survivors_name_a_killed_rank_each_time(tmp_path: Path, record: Recording) -> None:
    """Whoever dies, and whenever: every survivor names it, and nothing is committed. ``-s`` prints how soon."""
    times: dict[str, list[float]] = {moment: [] for moment in kills.MOMENTS}
    # Each moment meets each rank: three and four have no common divisor.
    turns = zip(itertools.cycle(kills.MOMENTS), itertools.cycle(range(RANKS)), range(ROUNDS), strict=False)
    with record(f"a save or a restore of {RANKS} ranks", "kill -9 of one rank", "local") as case:
        for moment, victim, number in turns:
            root, note = tmp_path / f"run-{number}", tmp_path / f"died-{number}"
            found = killed_once({"root": str(root), "victim": victim, "moment": moment, "note": str(note)})
            assert [answer is None for answer in found] == [rank == victim for rank in range(RANKS)]
            for answer in found:
                if answer is not None:
                    assert f"rank {victim} (" in answer["said"], (moment, answer)
                    assert "is gone" in answer["said"], (moment, answer)
                    if (victim, moment) == (
                        0,
                        "commit",
                    ):  # the others had uploaded all, and cannot know what became of it
                        assert "Whether it had committed" in answer["said"]
                    times[moment].append(answer["heard"] - float(note.read_text()))
            assert [c.step for c in cloudckpt.open(root).checkpoints()] == [0], moment
            case.points += 1
        everything = [*itertools.chain(*times.values())]
        case.figures["median ms until a survivor's call has raised"] = round(1000 * statistics.median(everything), 1)
    print(f"\n{ROUNDS} kills of one of {RANKS} ranks; ms from SIGKILL until a survivor's call has raised")
    for moment, own in [*times.items(), ("all", everything)]:
        print(f"{moment:>10}: median {1000 * statistics.median(own):.1f}, max {1000 * max(own):.1f}")


@pytest.mark.timeout(300)
def test_rank_zero_dies_after_its_commit_and_before_it_tells(tmp_path: Path, record: Recording) -> None:
    """The checkpoint is good, and the next job has it; the others are told that they cannot know."""
    with record(f"a save of {RANKS} ranks", "kill -9 of rank zero, committed and not told", "local") as case:
        words = {"root": str(tmp_path / "run"), "victim": 0, "moment": "told", "note": str(tmp_path / "died")}
        died, *others = killed_once(words)
        assert died is None
        for answer in others:
            assert answer is not None
            assert "rank 0 (" in answer["said"], answer
            assert "is gone" in answer["said"], answer
            assert "Whether it had committed" in answer["said"], answer
        run = cloudckpt.open(tmp_path / "run")
        assert [c.step for c in run.checkpoints()] == [0, 1]
        assert cloudckpt.verify(tmp_path / "run", deep=True).ok
        case.points = 1
