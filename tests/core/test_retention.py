"""What retention keeps and lets go, against a plain model of its rules.

(Past 350 lines: the rules are one table.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.core.model import Checkpoint, State
from cloudckpt.core.policy import KeepBest, Policy
from cloudckpt.core.retention import PrunePlan, metric_value, plan_prune, ranked
from cloudckpt.testing.builders import at, checkpoint
from cloudckpt.testing.strategies import METRICS, checkpoint_lists, policies


def losses(*values: float | None, metric: str = "loss") -> list[Checkpoint]:
    """Committed checkpoints of steps 1, 2, 3 … with these losses; None for one without."""
    return [checkpoint(step, metrics={} if value is None else {metric: value}) for step, value in enumerate(values, 1)]


def best(n: int | None, *, keep_last: int | None = 1, mode: str = "min", **fields: Any) -> Policy:
    """The best ``n`` by loss beside the last ``keep_last``; unscored ones are not kept for it."""
    return Policy(**{"keep_last": keep_last, "keep_best": (KeepBest("loss", mode, n),), "keep_unscored": 0, **fields})


def kept_steps(plan: PrunePlan) -> set[int]:
    """The steps that stay."""
    return {c.step for c in plan.kept}


def reasons_by_step(plan: PrunePlan) -> dict[int, tuple[str, ...]]:
    """Per step why it is kept; nothing where it is let go."""
    return {d.checkpoint.step: d.reasons if d.keep else () for d in plan.decisions}


def best_steps(plan: PrunePlan) -> list[int]:
    """The steps of the first best list, best first."""
    steps = {d.checkpoint.id: d.checkpoint.step for d in plan.decisions}
    return [steps[save_id] for save_id in plan.best[0].ids]


# -- the seed's scenarios ------------------------------------------------------------------------------------


def test_best_does_not_count_against_last() -> None:
    """Limit 3, N 2, six saves with the two best first: exactly {1, 2} and {4, 5, 6} remain (S8, L3)."""
    plan = plan_prune(losses(1.0, 1.1, 2.0, 2.1, 2.2, 2.3), best(2, keep_last=3))

    assert kept_steps(plan) == {1, 2, 4, 5, 6}


def test_a_new_best_displaces_the_worst_of_the_list() -> None:
    """[(2500, 3.5), (1250, 3.6)] and a new (6250, 3.15), N=2, gives [(6250, 3.15), (2500, 3.5)] (S5)."""
    entries = [checkpoint(step, metrics={"loss": value}) for step, value in [(1250, 3.6), (2500, 3.5), (6250, 3.15)]]

    assert best_steps(plan_prune(entries, best(2))) == [6250, 2500]


@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [("min", (2.0, 3.0, 2.5), [1, 3]), ("max", (0.9, 0.5, 0.7), [1, 3])],
)
def test_a_save_qualifies_against_the_worst_of_the_list(
    mode: str, values: tuple[float, ...], expected: list[int]
) -> None:
    """N=2: losses 2.0, 3.0, 2.5 give [2.0, 2.5]; accuracies 0.9, 0.5, 0.7 give [0.9, 0.7] (L1)."""
    assert best_steps(plan_prune(losses(*values), best(2, mode=mode))) == expected


@pytest.mark.parametrize("n_best", [0, 1, 2, 3, None])
@pytest.mark.parametrize("keep_last", [1, 2, 3, None])
def test_the_newest_is_kept_whatever_the_numbers(keep_last: int | None, n_best: int | None) -> None:
    """For all limits >= 1 and N >= 0 the checkpoint just committed stays, however bad it is (L2)."""
    entries = losses(1.0, 2.0, 3.0, 4.0, 5.0)
    for count in range(1, 6):
        assert count in kept_steps(plan_prune(entries[:count], best(n_best, keep_last=keep_last)))


def test_the_best_survives_a_list_evicted_before_its_successor_was_durable() -> None:
    """Limit 2, N 1; 1 (loss 1.0) is saved, 2 (0.9) fails, 3, 4, 5 are saved: 1 is still there, the failed one counts nowhere (L28)."""
    entries = losses(1.0, 0.9, 1.3, 1.2, 1.1)
    for failed in (State.PENDING, State.RETIRED):
        entries[1] = replace(entries[1], state=failed)
        plan = plan_prune(entries, best(1, keep_last=2))

        assert kept_steps(plan) == {1, 4, 5}
        assert best_steps(plan) == [1]


def test_a_metric_of_zero_is_a_metric() -> None:
    """Loss 0.0 is the best loss, and accuracy 0.0 is ranked too (L4)."""
    assert best_steps(plan_prune(losses(0.5, 0.0, 0.1), best(2))) == [2, 3]
    assert best_steps(plan_prune(losses(0.5, 0.0), best(2, mode="max"))) == [1, 2]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_nan_and_infinities_are_never_best(value: float, mode: str) -> None:
    """NaN and infinities take no free slot of the best list; such a save is still kept as recent (L5)."""
    plan = plan_prune(losses(value, 1.0, value), best(3, mode=mode))

    assert best_steps(plan) == [2]
    assert reasons_by_step(plan) == {1: (), 2: ("best #1",), 3: ("last #1",)}


def test_of_equal_metrics_the_older_is_better() -> None:
    """Three equal losses, N=2: the first two stay best, in their order (C14)."""
    assert best_steps(plan_prune(losses(1.0, 1.0, 1.0, 0.5), best(3))) == [4, 1, 2]


def test_order_is_by_seq_not_by_step_or_time() -> None:
    """After going back from step 300 to 100, with a clock an hour back, the save made last is the newest (C12, C15, L14)."""
    entries = [
        checkpoint(300, seq=1, committed_at=at(900)),
        checkpoint(100, seq=2, committed_at=at(800)),
        checkpoint(200, seq=3, committed_at=at(700)),
    ]

    assert reasons_by_step(plan_prune(entries, Policy(keep_last=2))) == {300: (), 100: ("last #2",), 200: ("last #1",)}


def test_a_step_saved_again_is_a_checkpoint_of_its_own() -> None:
    """Step 100 saved again after going back: both stand, each with its own metric, until the rules retire one (C15, L6)."""
    entries = [
        checkpoint(100, seq=1, metrics={"loss": 1.0}),
        checkpoint(200, seq=2, metrics={"loss": 0.5}),
        checkpoint(100, seq=3, metrics={"loss": 0.9}),
    ]
    plan = plan_prune(entries, best(2))

    assert [(d.checkpoint.step, d.keep, d.reasons) for d in plan.decisions] == [
        (100, False, ("not in best 2", "not in last 1")),
        (200, True, ("best #1",)),
        (100, True, ("best #2", "last #1")),
    ]


def test_a_resume_without_metrics_keeps_the_best() -> None:
    """Saves 1..5 with best 2, then 6..10 without metrics: step 2 is still there (S7)."""
    plan = plan_prune(losses(3.0, 1.0, 2.0, 2.5, 2.6, None, None, None, None, None), best(1, keep_last=2))

    assert kept_steps(plan) == {2, 9, 10}


def test_best_checkpoints_found_damaged_free_their_slots() -> None:
    """Two bests whose objects were removed by hand count nowhere, their slots are free, and no rule deletes them (H1, C10)."""
    entries = losses(0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    entries[:2] = [replace(e, damaged="model is missing") for e in entries[:2]]
    plan = plan_prune(entries, best(2, keep_last=2))

    assert reasons_by_step(plan) == {
        1: ("damaged: only a person deletes it",),
        2: ("damaged: only a person deletes it",),
        3: ("best #1",),
        4: ("best #2",),
        5: ("last #2",),
        6: ("last #1",),
    }


# -- every rule by itself ------------------------------------------------------------------------------------


def test_each_decision_names_its_reasons() -> None:
    """The rules are combined by "or", and each kept step says which rules kept it, each other one why not."""
    entries = losses(0.4, 0.1, 0.3, 0.2)
    plan = plan_prune(entries, best(1, keep_every=4, keep_within_s=60))

    assert [(d.checkpoint.step, d.reasons) for d in plan.decisions] == [
        (1, ("not in best 1", "not in last 1", "not a multiple of 4 steps", "not within 60 s of the newest")),
        (2, ("best #1",)),
        (3, ("within 60 s",)),
        (4, ("last #1", "every 4 steps", "within 60 s")),
    ]
    assert plan.size_bytes == 1000
    assert plan.retired == (entries[0],)


def test_keep_last_none_keeps_all() -> None:
    """``keep_last=None`` is unlimited (L7)."""
    assert kept_steps(plan_prune(losses(1, 2, 3), Policy(keep_last=None))) == {1, 2, 3}


def test_keep_best_none_keeps_every_scored_one() -> None:
    """``keep_best=None`` keeps all that have the metric."""
    assert kept_steps(plan_prune(losses(1, None, 3, None), best(None))) == {1, 3, 4}


def test_several_best_rules_name_their_metric() -> None:
    """With two metrics each reason says by which."""
    entries = [
        checkpoint(1, metrics={"loss": 0.1, "acc": 0.2}),
        checkpoint(2, metrics={"loss": 0.3, "acc": 0.9}),
        checkpoint(3, metrics={"loss": 0.2, "acc": 0.1}),
        checkpoint(4, metrics={"loss": 0.5, "acc": 0.2}),
    ]
    plan = plan_prune(entries, Policy(keep_last=1, keep_best=(KeepBest("loss", "min", 1), KeepBest("acc", "max", 1))))

    assert [(d.checkpoint.step, d.reasons) for d in plan.decisions] == [
        (1, ("best #1 by loss",)),
        (2, ("best #1 by acc",)),
        (3, ("not in best 1 by loss", "not in best 1 by acc", "not in last 1")),
        (4, ("last #1",)),
    ]


def test_the_newest_unscored_wait_for_their_metric() -> None:
    """Under a monitor the newest two without the metric are kept for an evaluator that comes late."""
    plan = plan_prune(losses(None, None, None, 1.0, 2.0), best(1, keep_unscored=2))

    assert reasons_by_step(plan) == {1: (), 2: ("unscored #2",), 3: ("unscored #1",), 4: ("best #1",), 5: ("last #1",)}


def test_nan_does_not_wait_for_a_metric() -> None:
    """A save whose loss is NaN was evaluated: it takes no place of one that still waits (L5)."""
    plan = plan_prune(losses(None, math.nan, math.nan, 1.0), best(1, keep_unscored=2))

    assert reasons_by_step(plan) == {1: ("unscored #1",), 2: (), 3: (), 4: ("best #1", "last #1")}


def test_without_a_monitor_nothing_is_unscored() -> None:
    """``keep_unscored`` speaks of a monitored metric only."""
    assert kept_steps(plan_prune(losses(None, None), Policy(keep_last=1, keep_unscored=2))) == {2}


@pytest.mark.parametrize("fields", [{"pinned": True}, {"held": True}])
def test_pinned_and_held_are_beyond_every_rule(fields: dict[str, bool]) -> None:
    """A pinned or a held one stays, though no rule keeps it (I5)."""
    entries = losses(1, 2, 3)
    entries[0] = replace(entries[0], **fields)  # type: ignore[arg-type]  # the names are in the table above

    assert reasons_by_step(plan_prune(entries, Policy(keep_last=1)))[1] == (next(iter(fields)),)


def test_what_the_run_resumed_from_stays() -> None:
    """The checkpoint this run resumed from is kept until the first commit moves on (I5)."""
    entries = losses(1, 2, 3)
    plan = plan_prune(entries, Policy(keep_last=1), resumed_from=entries[1].id)

    assert reasons_by_step(plan) == {1: (), 2: ("resumed from",), 3: ("last #1",)}


def test_a_marked_one_counts_in_no_rule_but_pinned() -> None:
    """A diverged checkpoint is neither best nor last; pinned it stays, else it goes and says why (S10)."""
    entries = losses(0.1, 0.2, 0.3, 0.4)
    entries[0] = replace(entries[0], marks=("diverged",), pinned=True)
    entries[3] = replace(entries[3], marks=("diverged", "spike"))
    plan = plan_prune(entries, best(1))

    assert [(d.checkpoint.step, d.keep, d.reasons) for d in plan.decisions] == [
        (1, True, ("pinned",)),
        (2, True, ("best #1",)),
        (3, True, ("last #1",)),
        (4, False, ("marked diverged, spike",)),
    ]


def test_a_run_never_ends_up_without_a_whole_checkpoint() -> None:
    """If all are marked or damaged, the newest whole one stays beside the damaged ones."""
    marked = [checkpoint(step, marks=("diverged",)) for step in (1, 2)]
    damaged = checkpoint(3, damaged="a byte flipped")

    assert kept_steps(plan_prune([*marked, damaged], Policy(keep_last=1))) == {2, 3}
    assert kept_steps(plan_prune([damaged], Policy(keep_last=1))) == {3}


def test_keep_within_counts_from_the_newest_commit() -> None:
    """What was committed within a time of the newest stays: no clock is read, and a huge time keeps all."""
    entries = [checkpoint(step, committed_at=at(step)) for step in (1, 58, 59, 60)]
    entries.append(checkpoint(61, committed_at=None))

    assert kept_steps(plan_prune(entries, Policy(keep_last=1, keep_within_s=120))) == {58, 59, 60, 61}
    assert kept_steps(plan_prune(entries, Policy(keep_last=1, keep_within_s=1e300))) == {1, 58, 59, 60, 61}


def test_an_empty_run_has_an_empty_plan() -> None:
    """Nothing committed: nothing to decide, nothing best, nothing recent."""
    plan = plan_prune([checkpoint(1, state=State.PENDING)], best(2, keep_within_s=60))

    assert (plan.decisions, plan.best[0].ids, plan.recent, plan.size_bytes) == ((), (), (), 0)


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"loss": 1.5}, 1.5),
        ({"loss": 0.0}, 0.0),
        ({"loss": 2}, 2),
        ({"eval_loss": 0.0}, 0.0),
        ({"loss": 1.0, "eval_loss": 2.0}, 1.0),
        ({"loss": math.nan, "eval_loss": 2.0}, None),
        ({"loss": math.inf}, None),
        ({"train_loss": 1.0}, None),
        ({}, None),
    ],
)
def test_which_value_ranks(metrics: dict[str, float], expected: float | None) -> None:
    """``eval_loss`` stands in where ``loss`` is absent, 0.0 is a value, NaN and infinities are none (L4, L5)."""
    assert metric_value(metrics, "loss") == expected


# -- for any run and any policy ------------------------------------------------------------------------------


def must_keep(entries: Sequence[Checkpoint], policy: Policy, resumed_from: str | None) -> set[str]:
    """I5 and the rules, said in the plainest way: a second opinion on ``plan_prune``."""
    committed = [e for e in entries if e.state is State.COMMITTED]
    usable = sorted((e for e in committed if not e.damaged and not e.marks), key=lambda e: -e.seq)
    kept = [e for e in committed if e.pinned or e.held or e.damaged or e.id == resumed_from]
    kept += usable[:1]
    kept += usable[: policy.keep_last] if policy.keep_last else usable
    kept += [e for e in usable if policy.keep_every and e.step % policy.keep_every == 0]
    for rule in policy.keep_best:
        kept += top(usable, rule)
        kept += [e for e in usable if not {rule.metric, f"eval_{rule.metric}"} & {*e.metrics}][: policy.keep_unscored]
    return {e.id for e in kept}


def top(usable: Sequence[Checkpoint], rule: KeepBest) -> list[Checkpoint]:
    """Sort all, take N (L1)."""
    scored = [(value, e.seq, e) for e in usable if (value := metric_value(e.metrics, rule.metric)) is not None]
    scored.sort(key=lambda row: (row[0] if rule.mode == "min" else -row[0], row[1]))
    return [e for _, _, e in scored][: rule.n]


@given(checkpoint_lists(), policies(), st.integers(0, 8))
def test_the_good_ones_are_in_no_retire_plan(entries: list[Checkpoint], policy: Policy, resumed: int) -> None:
    """Newest usable, best-k, last-n, pinned, held, damaged and resumed-from are never retired by a rule (I5)."""
    resumed_from = entries[resumed].id if resumed < len(entries) else None
    plan = plan_prune(entries, policy, resumed_from=resumed_from)
    kept = {c.id for c in plan.kept}

    assert must_keep(entries, policy, resumed_from) <= kept
    if policy.keep_within_s is None and any(e.usable for e in entries):
        assert must_keep(entries, policy, resumed_from) == kept
    assert [d.checkpoint for d in plan.decisions] == [e for e in entries if e.state is State.COMMITTED]
    assert all(d.reasons for d in plan.decisions)


@given(checkpoint_lists(), policies())
def test_the_best_list_is_sort_all_take_n(entries: list[Checkpoint], policy: Policy) -> None:
    """Every best list equals "sort all, take N", is no longer than N and holds usable committed ones only (L1, S3, I4)."""
    usable = [e for e in entries if e.usable]
    for rule, found in zip(policy.keep_best, plan_prune(entries, policy).best, strict=True):
        assert list(found.ids) == [e.id for e in top(usable, rule)]
        assert rule.n is None or len(found.ids) <= rule.n


@given(checkpoint_lists(), st.sampled_from(METRICS), st.sampled_from(["min", "max"]))
def test_ranking_never_puts_a_better_one_behind(entries: list[Checkpoint], metric: str, mode: str) -> None:
    """Along the ranking the metric gets no better, and of equal ones the older comes first (C14)."""
    rows = [(metric_value(e.metrics, metric), e.seq) for e in ranked(entries, metric, mode)]
    for (one, older), (other, newer) in pairwise(rows):
        assert one is not None
        assert other is not None
        assert (one < other if mode == "min" else one > other) or (one == other and older < newer)


@given(checkpoint_lists(), policies(), policies())
def test_adding_a_rule_never_retires_more(entries: list[Checkpoint], policy: Policy, other: Policy) -> None:
    """The rules form a union: whatever one policy keeps, it keeps with any further rule beside it."""
    kept = {c.id for c in plan_prune(entries, policy).kept}
    known = {rule.metric for rule in policy.keep_best}
    further = tuple(rule for rule in other.keep_best if rule.metric not in known)
    wider = [
        replace(policy, keep_best=policy.keep_best + further),
        replace(policy, keep_every=policy.keep_every or other.keep_every),
        replace(policy, keep_within_s=policy.keep_within_s or other.keep_within_s),
        replace(policy, keep_last=None),
    ]
    for wide in wider:
        assert kept <= {c.id for c in plan_prune(entries, wide).kept}


@given(checkpoint_lists(), policies())
def test_pruning_what_was_pruned_retires_nothing(entries: list[Checkpoint], policy: Policy) -> None:
    """A plan carried out leaves nothing for the same policy to retire."""
    assert plan_prune(plan_prune(entries, policy).kept, policy).retired == ()


@given(checkpoint_lists(), policies(), st.randoms())
def test_the_order_of_the_entries_does_not_matter(entries: list[Checkpoint], policy: Policy, random: Any) -> None:
    """Order is by ``seq`` alone: entries given in any order give the same plan (L14)."""
    shuffled = list(entries)
    random.shuffle(shuffled)

    assert plan_prune(shuffled, policy) == plan_prune(entries, policy)
