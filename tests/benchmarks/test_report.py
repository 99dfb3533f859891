"""From results to verdicts to the page."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bars
from benchmarks.bars import BARS, Bar, judge
from benchmarks.gpu_page import gpu_section
from benchmarks.gpus_page import several_gpus_section
from benchmarks.machine import facts, without_paths
from benchmarks.plans import BARS as BAR_PLANS
from benchmarks.plans import PLANS, quick
from benchmarks.profiles import Share, profile_section, shares
from benchmarks.report import page
from benchmarks.tables import Results

Row = Mapping[str, Any]


def _row(case: str, number: int, wall_s: float, *, kind: str = "peer", size: str = "45m", **more: Any) -> Row:
    given = {"group": "save-s3", "link": "plain", "bytes": 1 << 29, "cpu_s": wall_s / 2, "peak_bytes": 1 << 20}
    return {"case": case, "kind": kind, "size": size, "processes": 0, "round": number, "wall_s": wall_s, **given,
            "requests": {"Put": 3, "UploadPart": 9}, "bytes_out": 0, **more}  # fmt: skip


def _pairs(ours: list[float], floor: list[float]) -> list[Row]:
    return [_row("cloudckpt", n, w, kind="ours") for n, w in enumerate(ours)] + [
        _row("socket_1", n, w, kind="floor") for n, w in enumerate(floor)
    ]


def _bar(name: str) -> Bar:
    return next(found for found in BARS if found.name == name)


def test_the_bound_is_held_against_the_bar_not_the_median() -> None:
    """A median below the limit does not meet the bar while three of eleven pairs are above it."""
    good, bad = [1.1] * 9 + [1.5] * 2, [1.1] * 8 + [1.5] * 3
    assert judge(_bar("save-s3"), _pairs(good, [1.0] * 11)).met
    missed = judge(_bar("save-s3"), _pairs(bad, [1.0] * 11))
    assert (missed.value, missed.upper, missed.pairs, missed.met) == (1.1, 1.5, 11, False)


def test_the_best_peer_is_that_of_the_run() -> None:
    """A bar against the peers is held against the one with the lowest median; clients and floors are none."""
    rows = [_row("cloudckpt", n, 0.5, kind="ours") for n in range(11)]
    rows += [_row(name, n, wall) for name, wall in (("slow", 3.0), ("fast", 0.6)) for n in range(11)]
    rows += [_row("bare", n, 0.1, kind="client") for n in range(11)]
    found = judge(_bar("save-s3-far-peers"), rows)
    assert (found.base, round(found.value, 3), found.met) == ("fast", 0.833, True)


def test_a_value_that_stands_alone_is_its_worst_round() -> None:
    """One save with four requests beside its payload misses the bar of three, whatever the others did."""
    rows = _pairs([1.0] * 3, [1.0] * 3)
    assert judge(_bar("requests-save"), rows).met
    rows[1] = {**rows[1], "requests": {"Put": 3, "List": 1, "UploadPart": 9}}
    assert judge(_bar("requests-save"), rows).value == 4
    assert not judge(_bar("requests-around"), rows).met


def test_what_was_not_measured_is_not_met() -> None:
    """A missing or a failed case is told with its reason, and counts as a miss."""
    nothing = judge(_bar("save-s3"), [])
    assert (nothing.met, nothing.why_not) == (False, "cloudckpt was not run at 45m")
    failed: Row = {**_row("cloudckpt", 0, 1.0), "error": "no room"}
    assert judge(_bar("save-s3"), [failed]).why_not == "cloudckpt: no room"


def test_every_bar_has_a_plan_that_measures_it() -> None:
    """The case, the base and both sizes of a bar are in its plan, and the pairs are eleven or more."""
    for each in BARS:
        plan = BAR_PLANS[each.plan]
        assert each.case in plan.cases, each.name
        assert {each.size, each.base_size or each.size} <= set(plan.sizes), each.name
        if each.base not in {bars.ALONE, bars.BEST_PEER}:
            assert each.base in plan.cases, each.name
        assert plan.rounds >= 11 or each.base == bars.ALONE, each.name


def test_the_quick_bars_can_still_be_met() -> None:
    """The quick plans keep every bar's case and base, in enough pairs for a bound."""
    for each in BARS:
        plan = quick(BAR_PLANS[each.plan])
        if plan is None or each.size not in plan.sizes:
            continue
        assert each.case in plan.cases
        assert each.base in {bars.ALONE, bars.BEST_PEER, *plan.cases}
        assert plan.rounds >= 5 or each.base == bars.ALONE


@pytest.fixture
def results() -> Results:
    """A table of which one peer failed, and one bar that is missed."""
    failed: Row = {**_row("obstore_put", 0, 1.0), "error": "No module named 'obstore'"}
    rows = [*_pairs([1.0, 1.2, 1.1], [1.0, 1.0, 1.0]), _row("s3fs_pipe", 0, 9.0), failed]
    return Results({"save-s3": list(rows), "bars-save-s3": _pairs([2.0] * 11, [1.0] * 11)}, {"save-s3": facts()})


def test_the_page_tells_ratios_commands_verdicts_and_failures(results: Results) -> None:
    """Each table has its command, each bar its verdict, a peer that failed its reason, and a miss its note."""
    text = page(results, {"save-s3": "The uploader\nis slow.", "save-s3-tls": "not shown"}, {"save-s3": "save-s3.svg"})
    assert "| **cloudckpt** | 3 | 1.100 (1.000–1.200) | 0.45 | 1.10 |" in text  # noqa: RUF001 - a dash
    assert ".venv-bench/bin/python -m benchmarks save-s3`" in text
    assert "![Save to S3](performance/save-s3.svg)" in text
    assert "| obstore_put | 0 | failed: No module named 'obstore' |" in text
    line = next(line for line in text.splitlines() if line.startswith("| save to S3, 0.5 GiB, wall |"))
    assert re.search(r"1.2 . socket_1 \| 2.00 \(2.000 s : 1.000 s\) \| 2.00 \| 11 \| \*\*not met\*\*", line)
    assert "- **save to S3, 0.5 GiB, wall**: The uploader is slow." in text
    assert "- **save to S3, 2 GiB, wall**: nobody has explained this yet." in text


def test_a_note_is_only_for_what_is_missed(results: Results) -> None:
    """The reason a bar was once missed for is not printed when it is met."""
    results.rows["bars-save-s3"] = _pairs([1.0] * 11, [1.0] * 11)
    assert "The uploader is slow" not in page(results, {"save-s3": "The uploader is slow."}, {})


def test_nothing_published_names_this_machine(results: Results) -> None:
    """Facts and errors carry no host name, no path, no URL and no port."""
    said = without_paths("OSError: /home/somebody/x.py: no answer from http://127.0.0.1:4711/b, nor 127.0.0.1:99")
    assert said == "OSError: (path): no answer from (url) nor 127.0.0.1"
    text = page(results, {}, {})
    assert str(Path.home()) not in text
    assert str(Path(__file__).parents[2]) not in text
    assert re.fullmatch(r"\w+ \d+(\.\d+)*", facts()["kernel"])


def test_every_plan_is_told_on_the_page() -> None:
    """A table with results has a title: the page knows every plan."""
    one = [_row("cloudckpt", 0, 1.0, kind="ours"), _row("socket_1", 0, 1.0, kind="floor")]
    later = {"stall_s": 0.1, "total_s": 0.2, "lost_s": 0.1, "slowdown": 1.1}
    for name, plan in PLANS.items():
        rows = [{**each, "group": plan.group, "link": plan.link, "first": later, "later": later} for each in one]
        assert f"`.venv-bench/bin/python -m benchmarks {name}`" in page(Results({name: list(rows)}, {}), {}, {})


def test_the_page_tells_of_one_gpu(tmp_path: Path) -> None:
    """What gpu_saves.py printed becomes a section with its bars: the worst save is held against each."""
    save = {"blocked_s": 0.4, "of_raw": 0.99, "lost_of_step": 1.5}
    lines = [
        {"case": "machine", "device": "A GPU", "torch": "2.11", "gib": 20.0, "step_s": 0.25},
        {"case": "raw", "gib_s": 50.0},
        {"case": "prepare", "worst_step": 1.5},
        {"case": "copy", **save},
        {"case": "copy", **save, "of_raw": 0.85},
        {"case": "overlap", **save, "lost_of_step": 0.04},
        {"case": "overlap", **save, "lost_of_step": 0.06},
        {"case": "restore", "s": 1.0, "gib_s": 20.0, "exact": True},
    ]
    path = tmp_path / "saves.jsonl"
    assert not gpu_section(path)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    text = gpu_section(path)

    assert "| `save()` blocks, copy mode, of the raw rate | ≥ 90.0% | 85.0% | **missed** |" in text
    assert "| first save, 30 s after `prepare`, by a later one | ≤ 2.00 | 1.00 | met |" in text
    assert "| training lost, overlap, of a step | ≤ 5.0% | 6.0% | **missed** |" in text
    assert "accumulated" not in text
    assert "a copy takes 0.40 s" in text
    assert "equal bit for bit" in text
    assert text in page(Results({}, {}), {}, {}, gpu=text)


def test_the_page_tells_of_several_gpus(tmp_path: Path) -> None:
    """What gpu_fsdp2.py printed becomes a table for each kind of store, what failed a line."""
    measured = {
        "to": "s3", "first_blocks_s": 0.3, "blocks_s": 0.1, "blocks_p99_s": 0.2, "slowdown": 1.25, "total_s": 1.5,
        "restore_s": 1.4, "host_gib": 1.5, "state_gib": 1.0, "exact": True,
    }  # fmt: skip
    lines = [
        {"case": "machine", "device": "A GPU", "ranks": 2, "torch": "2.11", "gib": 1.5, "cores": 32},
        {"case": "copy", **measured},
        {"case": "thread", **measured, "exact": False, "slowdown": None},
        {"case": "process", "error": "a rank ended with 1"},
        {"case": "killed", "ranks": 2, "told_after_s": 0.25, "said": "RankError: rank 1 (host, pid 1) is gone"},
        {"case": "restarted", "ranks": 1, "step": 1, "exact": True},
    ]
    path = tmp_path / "fsdp2.jsonl"
    assert not several_gpus_section(path)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    text = several_gpus_section(path)

    plain = text.replace("\N{MULTIPLICATION SIGN}", "times")
    assert '| cloudckpt, `stage="copy"` | 100 (200) | 300 | times 1.25 | 1.50 | 1.40 | times 1.50 |' in plain
    assert "| `dcp.async_save`, thread, pinned **NOT EQUAL** | 100 (200) | 300 |  | 1.50 | 1.40 | times 1.50 |" in plain
    assert "local disk" not in text
    assert "process: a rank ended with 1" in text
    assert "after 0.25 s the others raised `RankError: rank 1 (host, pid 1) is gone`. Started again on 1" in text


def test_a_profile_counts_the_innermost_function_of_what_cloudckpt_does() -> None:
    """Samples of others, and of what is made before a save is timed, are left out."""
    folded = [
        "main (benchmarks/case.py:9);save (/x/site-packages/cloudckpt/manager.py:5);send (/usr/lib/python3/ssl.py:7) 30",
        "run (threading.py:1);put (/x/cloudckpt/storage/direct/wire.py:5) 60",
        "run (threading.py:1);put (/x/cloudckpt/storage/direct/wire.py:9) 10",
        "main (benchmarks/case.py:9);make_state (benchmarks/state.py:3) 500",
        "main (benchmarks/case.py:9);prepare (/x/cloudckpt/manager.py:2);touch (/x/cloudckpt/tensors/arena.py:2) 400",
        "broken",
    ]
    assert shares(folded) == [Share("put (cloudckpt/storage/direct/wire.py)", 0.7), Share("send (python3/ssl.py)", 0.3)]
    assert shares([]) == []


def test_the_page_tells_profiles_of_missed_bars_alone() -> None:
    """By the bar's title, and without what only waits; nothing of a bar that is met, and no section without any."""
    rows: list[Row] = [
        {"bar": "save-s3-tls", "shares": [["Condition.wait (threading.py)", 0.3], ["send (python3/ssl.py)", 0.35]]},
        {"bar": "lost", "shares": []},
    ]
    found = profile_section(rows, {"save-s3-tls": "save over TLS"})
    assert "- **save over TLS**: `send (python3/ssl.py)` 50%" in found
    assert "lost" not in found
    assert profile_section(rows, {}) == ""
