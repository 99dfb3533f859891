from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import pytest

from cloudckpt.core.markup import checkpoint_html, plan_html, run_html, sparkline, state_text
from cloudckpt.core.model import State
from cloudckpt.core.policy import KeepBest, Policy
from cloudckpt.core.retention import plan_prune
from cloudckpt.testing.builders import checkpoint, manifest

RUN = manifest(
    checkpoint(1, metrics={"loss": 0.5}, tags=("<b>",)),
    checkpoint(2, metrics={"loss": 0.25, "acc": 0.9}, root="s3://b/run"),
    checkpoint(3, state=State.PENDING),
    checkpoint(4, state=State.RETIRED),
    policy=Policy(keep_last=None, keep_best=(KeepBest("loss", "min", 1),)),
)


def cells(html: str, kind: str) -> list[str]:
    """The text of every cell; the markup is well formed, or this fails."""
    return ["".join(cell.itertext()) for cell in ET.fromstring(html.replace("<br>", "<br/>")).iter(kind)]


def test_a_run_is_a_table_of_what_is_not_retired() -> None:
    """Newest first, with a column for each metric; retired ones are left out and the metric is drawn."""
    html = run_html(RUN, "s3://b/<run>")
    assert cells(html, "th") == ["step", "at", "size", "acc", "loss", "kept because", "state"]
    assert [cells(html, "td")[row * 7] for row in range(3)] == ["3", "2", "1"]
    assert cells(html, "td")[13] == "committed"
    assert cells(html, "td")[6] == "uploading"
    assert "2 checkpoints, " in html
    assert "&lt;run&gt;" in html
    assert "<svg" in html


def test_a_line_says_where_it_begins_and_ends() -> None:
    """For those who hear the page: the first and the last value, of all that there are."""
    assert 'aria-label="3 values, from 0.5000 to 0.1250"' in sparkline([0.5, None, 0.25, 0.125])


def test_a_run_without_a_monitor_or_with_one_value_has_no_line() -> None:
    """There is nothing to draw: no monitor, or a single value."""
    assert "<svg" not in run_html(manifest(checkpoint(1), checkpoint(2)), "x")
    one = manifest(checkpoint(1, metrics={"loss": 1.0}), policy=RUN.policy)
    assert "<svg" not in run_html(one, "x")
    assert "1 checkpoint, " in run_html(one, "x")


def test_a_checkpoint_is_a_table_of_facts() -> None:
    """Each fact has a row; what people wrote is text, not markup."""
    found = checkpoint_html(checkpoint(1, metrics={"<loss>": 0.5}, tags=("<b>",), marks=("bad",), damaged="a byte"))
    facts = dict(zip(cells(found, "th"), cells(found, "td"), strict=True))
    assert facts["<loss>"] == "0.5000"
    assert facts["state"] == "committed, damaged, marked bad, tag:<b>"
    assert facts["kept because"] == "-"
    assert checkpoint(2)._repr_html_() == checkpoint_html(checkpoint(2))
    pending = checkpoint_html(checkpoint(3, state=State.PENDING))
    assert dict(zip(cells(pending, "th"), cells(pending, "td"), strict=True))["committed"] == "-"


def test_a_plan_is_a_table_of_decisions() -> None:
    """Each checkpoint with keep or retire and the reason, newest first."""
    plan = plan_prune(RUN.entries, Policy(keep_last=1))
    assert cells(plan_html(plan), "td") == [
        "keep", "2", "1000 B", "last #1",
        "retire", "1", "1000 B", "not in last 1",
    ]  # fmt: skip
    assert plan._repr_html_() == plan_html(plan)


@pytest.mark.parametrize(
    ("values", "points"),
    [
        ([], 0),
        ([1.0], 0),
        ([1.0, None], 0),
        ([math.nan, 1.0, math.inf], 0),
        ([1.0, 2.0], 2),
        ([1.0, 1.0], 2),
        ([3.0, None, 2.0, math.nan, 1.0], 3),
    ],
)
def test_a_line_has_a_point_for_each_value(values: list[float | None], points: int) -> None:
    """Missing values and NaN leave a gap; fewer than two values are no line."""
    drawn = sparkline(values)
    assert drawn.count(",") - drawn.count("values,") == points
    assert bool(drawn) is (points > 0)


def test_state_in_words() -> None:
    """What is on its way is uploading."""
    assert state_text(checkpoint(1, state=State.PENDING)) == "uploading"
    assert state_text(checkpoint(1, state=State.RETIRED)) == "retired"
