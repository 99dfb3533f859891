from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.core.model import Checkpoint, Manifest, State
from cloudckpt.core.policy import KeepBest, Policy
from cloudckpt.core.selection import Selector, parse_selector, select, select_best
from cloudckpt.errors import CheckpointNotFoundError, ConfigError
from cloudckpt.testing.builders import checkpoint, manifest
from cloudckpt.testing.strategies import checkpoint_lists

#: A run that went back: step 100 was saved twice; 400 diverged, 500 is damaged, 600 is under way, 700 was let go.
RUN = manifest(
    checkpoint(100, seq=1, id="aaaa0001", metrics={"loss": 0.1, "acc": 0.2}),
    checkpoint(200, seq=2, id="aaaa0002", tags=("release", "old"), metrics={"loss": 0.3, "acc": 0.9}),
    checkpoint(300, seq=3, id="bbbb0003", tags=("release",), metrics={"loss": 0.2}),
    checkpoint(100, seq=4, id="12345678", metrics={"loss": 0.4}),
    checkpoint(400, seq=5, id="cccc0005", marks=("diverged",), metrics={"loss": 0.01}),
    checkpoint(500, seq=6, id="dddd0006", damaged="a byte flipped", metrics={"loss": 0.02}),
    checkpoint(600, seq=7, id="eeee0007", state=State.PENDING),
    checkpoint(700, seq=8, id="ffff0008", state=State.RETIRED),
    policy=Policy(keep_last=None, keep_best=(KeepBest("loss", "min", 2), KeepBest("acc", "max", 1))),
)


def chosen(text: str | int, m: Manifest = RUN) -> int:
    """The ``seq`` of what a selector means."""
    return select(m, parse_selector(text)).seq


@pytest.mark.parametrize(
    ("text", "seq"),
    [
        ("latest", 4),
        ("last", 4),
        ("best", 1),
        (100, 4),
        ("100", 4),
        ("step-200", 2),
        ("checkpoint-300", 3),
        ("checkpoint-100.aaaa0001", 1),
        ("aaaa0001", 1),
        ("bbbb", 3),
        ("12345678", 4),
        ("tag:release", 3),
        ("tag:old", 2),
        (400, 5),
        ("checkpoint-500", 6),
        ("cccc", 5),
    ],
)
def test_what_each_spelling_means(text: str | int, seq: int) -> None:
    """Latest and best are usable ones; a step is its newest save; a name means that one, marked or damaged."""
    assert chosen(text) == seq


@pytest.mark.parametrize(
    ("text", "named"), [("latest", False), ("best", False), ("100", True), ("tag:x", True), ("aaaa", True)]
)
def test_only_latest_and_best_may_fall_back(text: str, *, named: bool) -> None:
    """A named selector means one certain checkpoint, and no other will do."""
    assert parse_selector(text).named is named


@pytest.mark.parametrize(
    ("text", "selector"),
    [
        (0, Selector(text="0", step=0)),
        ("1500", Selector(text="1500", step=1500)),
        (12345678, Selector(text="12345678", step=12345678)),
        ("12345678", Selector(text="12345678", step=12345678, id="12345678")),
        ("01234567", Selector(text="01234567", id="01234567")),
        ("tag:a b:c", Selector(text="tag:a b:c", tag="a b:c")),
        ("checkpoint-7.9f3ac2e1", Selector(text="checkpoint-7.9f3ac2e1", id="9f3ac2e1")),
        ("9f3a", Selector(text="9f3a", id="9f3a")),
    ],
)
def test_how_each_spelling_is_read(text: str | int, selector: Selector) -> None:
    """Digits are a step; only eight of them, as text, may also be a save id."""
    assert parse_selector(text) == selector


@pytest.mark.parametrize(
    "text",
    ["", "newest", "tag:", "-1", -1, "9f3", "9F3A", "1.5", 1.5, True, None, "../x", "checkpoint-x", "checkpoint-7.9f"],
)
def test_what_selects_nothing_says_what_would(text: object) -> None:
    """Anything else is refused, with the spellings there are."""
    with pytest.raises(ConfigError, match=r"selects nothing: write latest, best, a step .* tag:NAME or a save id"):
        parse_selector(text)  # type: ignore[arg-type]  # a user's mistake


@pytest.mark.parametrize(("text", "meant"), [("lastest", "latest"), ("lates", "latest"), ("bset", "best")])
def test_a_slip_of_the_finger_is_answered_with_what_was_meant(text: str, meant: str) -> None:
    """A misspelled word is refused, and the nearest one is named."""
    with pytest.raises(ConfigError, match=rf"did you mean {meant}\?"):
        parse_selector(text)


@pytest.mark.parametrize("text", ["1234", 1234, 12345678])
def test_a_step_that_is_gone_never_selects_another_by_its_id(text: str | int) -> None:
    """Step 1234 does not exist: the save whose id begins with 1234 is something else, and is not taken for it."""
    with pytest.raises(CheckpointNotFoundError, match="no committed checkpoint of step 1234"):
        chosen(text)


def test_a_step_wins_over_a_save_id_of_the_same_digits() -> None:
    """Where both exist, eight digits mean the step."""
    m = manifest(checkpoint(1, seq=1, id="12345678"), checkpoint(12345678, seq=2, id="aaaa0001"))
    assert chosen("12345678", m) == 2


ONLY_BAD = manifest(checkpoint(1, marks=("diverged",)), checkpoint(2, damaged="a byte flipped"))


@pytest.mark.parametrize(
    ("m", "text", "message"),
    [
        (RUN, 600, "checkpoint-600.eeee0007 is pending; only committed checkpoints can be selected"),
        (RUN, "eeee", "checkpoint-600.eeee0007 is pending; only committed"),
        (RUN, 700, "checkpoint-700.ffff0008 is retired: not in last 3; only committed"),
        (RUN, "checkpoint-700.ffff0008", "checkpoint-700.ffff0008 is retired: not in last 3"),
        (RUN, 260, "no committed checkpoint of step 260; the nearest are 200, 300, 400"),
        (RUN, "tag:final", "nothing has the tag 'final'; the tags there are: old, release"),
        (ONLY_BAD, "tag:final", "nothing has the tag 'final'; the tags there are: none"),
        (RUN, "99aa", "no committed checkpoint has the save id '99aa'; the nearest are "),
        (RUN, "cccc0055", "has the save id 'cccc0055'; the nearest are cccc0005"),
        (RUN, "tag:releas", "the tags there are: old, release (did you mean tag:release?)"),
        (ONLY_BAD, "latest", "all 2 committed checkpoints are marked or damaged; load one by name, for example 2"),
        (manifest(), "latest", "nothing matches 'latest': this run has no committed checkpoint"),
        (manifest(), 100, "nothing matches '100': this run has no committed checkpoint"),
    ],
)
def test_nothing_found_says_what_there_is(m: Manifest, text: str | int, message: str) -> None:
    """An error names what was asked for, why it is not to be had, and what could be asked for instead."""
    with pytest.raises(CheckpointNotFoundError) as missing:
        chosen(text, m)

    assert message in str(missing.value)


def test_the_beginning_of_several_save_ids_is_a_usage_error() -> None:
    """An ambiguous beginning is answered with what it could mean."""
    with pytest.raises(ConfigError, match="beginning of 2 save ids, write more of it: aaaa0001, aaaa0002"):
        chosen("aaaa", RUN)


# -- best ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "mode", "seq"),
    [
        (None, None, 1),
        ("loss", None, 1),
        ("loss", "max", 4),
        (None, "max", 4),
        ("acc", None, 2),
        ("acc", "min", 1),
    ],
)
def test_best_by_which_metric(metric: str | None, mode: str | None, seq: int) -> None:
    """Without a word the run's monitor rules; a monitored metric brings its direction, another one may be given."""
    assert select_best(RUN, metric, mode).seq == seq


@pytest.mark.parametrize(
    ("m", "metric", "mode", "message"),
    [
        (
            manifest(),
            None,
            None,
            'no metric is monitored in this run: say by which, as in best("val_loss", mode="min")',
        ),
        (RUN, "bleu", None, "best by 'bleu' needs a direction"),
        (RUN, "loss", "lower", "best by 'loss' needs a direction"),
    ],
)
def test_best_needs_a_metric_and_a_direction(m: Manifest, metric: str | None, mode: str | None, message: str) -> None:
    """Nobody guesses by what, or in which direction (L8)."""
    with pytest.raises(ConfigError) as refused:
        select_best(m, metric, mode)

    assert message in str(refused.value)


@pytest.mark.parametrize(("m", "known"), [(RUN, "acc, loss"), (manifest(checkpoint(1)), "none"), (ONLY_BAD, "none")])
def test_best_of_nothing_names_the_metrics_there_are(m: Manifest, known: str) -> None:
    """No usable checkpoint has the metric: the error lists those that they have."""
    with pytest.raises(CheckpointNotFoundError, match=f"finite 'bleu'; the metrics there are: {known}"):
        select_best(m, "bleu", "max")


@given(checkpoint_lists())
def test_latest_is_the_usable_one_with_the_highest_seq(entries: list[Checkpoint]) -> None:
    """Whatever the steps and the times: the save announced last wins (L14, C12)."""
    usable = [e for e in entries if e.usable]
    if usable:
        assert chosen("latest", manifest(*entries)) == max(e.seq for e in usable)
    else:
        with pytest.raises(CheckpointNotFoundError):
            chosen("latest", manifest(*entries))


@given(checkpoint_lists(), st.integers(0, 20))
def test_a_step_is_its_newest_committed_save(entries: list[Checkpoint], step: int) -> None:
    """Of several saves of one step the newest committed one is meant (C15)."""
    saves = [e.seq for e in entries if e.step == step and e.state is State.COMMITTED]
    if saves:
        assert chosen(step, manifest(*entries)) == max(saves)
    else:
        with pytest.raises(CheckpointNotFoundError):
            chosen(step, manifest(*entries))
