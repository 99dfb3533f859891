"""Turn what a person or a script says (``latest``, ``best``, ``1500``, ``tag:NAME`` …) into a checkpoint."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from cloudckpt.core import keys
from cloudckpt.core.model import Checkpoint, Manifest
from cloudckpt.core.retention import ranked
from cloudckpt.errors import CheckpointNotFoundError, ConfigError

__all__ = ["Selector", "parse_selector", "select", "select_best"]

_STEP = re.compile(r"(?:checkpoint-|step-)?(0|[1-9][0-9]{0,18})")
_ID = re.compile(r"[0-9a-f]{4,8}")
_SPELLINGS = "latest, best, a step (1500, step-1500, checkpoint-1500), tag:NAME or a save id"


@dataclass(frozen=True, slots=True, kw_only=True)
class Selector:
    """A parsed selector: exactly one field says how to choose, but for eight decimal digits.

    Those are a step, and a save id if no checkpoint has that step. Fewer digits are never the beginning of a
    save id: a step that is gone must not select (or remove) some other checkpoint.

    ``named`` selectors mean one certain checkpoint, marked or not; ``latest`` and ``best`` choose among the
    usable ones and may fall back to another.
    """

    text: str
    latest: bool = False
    best: bool = False
    step: int | None = None
    tag: str | None = None
    id: str | None = None

    @property
    def named(self) -> bool:
        """Whether it means one certain checkpoint."""
        return not (self.latest or self.best)


def parse_selector(text: str | int) -> Selector:
    """The selector in ``text``; an int is a step.

    Raises:
        ConfigError: it is none of the spellings.
    """
    word = str(text) if type(text) is int else text
    if not isinstance(word, str):
        raise ConfigError(f"{text!r} selects nothing: write {_SPELLINGS}")
    if word in {"latest", "last"}:
        return Selector(text=word, latest=True)
    if word == "best":
        return Selector(text=word, best=True)
    if match := _STEP.fullmatch(word):
        return Selector(text=word, step=int(match[1]), id=word if text == word and keys.is_save_id(word) else None)
    if word.startswith("tag:") and len(word) > len("tag:"):
        return Selector(text=word, tag=word.removeprefix("tag:"))
    if place := keys.parse_prefix(word):
        return Selector(text=word, id=place[1])
    if _ID.fullmatch(word):
        return Selector(text=word, id=word)
    near = difflib.get_close_matches(word, ["latest", "last", "best"], n=1, cutoff=0.7)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ConfigError(f"{text!r} selects nothing: write {_SPELLINGS}{hint}")


def select(manifest: Manifest, selector: Selector) -> Checkpoint:
    """The committed checkpoint that a selector means.

    Raises:
        CheckpointNotFoundError: none does; says what there is instead.
        ConfigError: the beginning of a save id is that of several.
    """
    committed = manifest.committed
    if selector.latest:
        found = [e for e in committed if e.usable]
    elif selector.best:
        return select_best(manifest)
    elif selector.step is not None:
        found = [e for e in committed if e.step == selector.step] or _by_id(committed, selector.id)
    elif selector.tag is not None:
        found = [e for e in committed if selector.tag in e.tags]
    else:
        found = _by_id(committed, selector.id)
        if len(found) > 1:
            raise ConfigError(
                f"{selector.text!r} is the beginning of {len(found)} save ids, write more of it: "
                f"{', '.join(e.id for e in found)}"
            )
    if not found:
        raise CheckpointNotFoundError(_nothing(manifest, selector))
    return found[-1]


def select_best(manifest: Manifest, metric: str | None = None, mode: str | None = None) -> Checkpoint:
    """The best usable checkpoint by a metric; without one, by the run's monitor.

    Raises:
        ConfigError: no metric is monitored and none was given, or it was given without a direction.
        CheckpointNotFoundError: no usable checkpoint has the metric.
    """
    rules = {rule.metric: rule.mode for rule in manifest.policy.keep_best}
    name = metric or next(iter(rules), None)
    if name is None:
        raise ConfigError('no metric is monitored in this run: say by which, as in best("val_loss", mode="min")')
    direction = mode or rules.get(name)
    if direction not in {"min", "max"}:
        raise ConfigError(f'best by {name!r} needs a direction: mode="min" or mode="max"')
    order = ranked(manifest.committed, name, direction)
    if not order:
        known = sorted({m for e in manifest.committed if e.usable for m in e.metrics})
        raise CheckpointNotFoundError(
            f"no usable checkpoint has a finite {name!r}; the metrics there are: {', '.join(known) or 'none'}"
        )
    return order[0]


def _by_id(entries: Sequence[Checkpoint], beginning: str | None) -> list[Checkpoint]:
    return [e for e in entries if beginning is not None and e.id.startswith(beginning)]


def _nothing(manifest: Manifest, selector: Selector) -> str:
    committed = manifest.committed
    others = [e for e in manifest.entries if e.step == selector.step] or _by_id(manifest.entries, selector.id)
    if others:
        other = others[-1]
        why = f": {other.retired_because}" if other.retired_because else ""
        return f"{other.name} is {other.state}{why}; only committed checkpoints can be selected"
    if not committed:
        return f"nothing matches {selector.text!r}: this run has no committed checkpoint"
    if selector.latest:
        return (
            f"all {len(committed)} committed checkpoints are marked or damaged; load one by name, for example "
            f"{committed[-1].step}"
        )
    if selector.tag is not None:
        tags = sorted({name for e in committed for name in e.tags})
        alike = difflib.get_close_matches(selector.tag, tags, n=1)
        hint = f" (did you mean tag:{alike[0]}?)" if alike else ""
        return f"nothing has the tag {selector.tag!r}; the tags there are: {', '.join(tags) or 'none'}{hint}"
    if selector.step is not None:
        wanted = selector.step
        near = sorted({e.step for e in committed}, key=lambda step: (abs(step - wanted), step))[:3]
        return f"no committed checkpoint of step {wanted}; the nearest are {', '.join(map(str, sorted(near)))}"
    ids = [e.id for e in committed]
    # The text may be the folder's name: what is compared is the id in it.
    similar = difflib.get_close_matches(selector.id or "", ids, n=3, cutoff=0.5) or ids[-3:]
    return f"no committed checkpoint has the save id {selector.text!r}; the nearest are {', '.join(similar)}"
