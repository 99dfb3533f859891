"""Rules by which a store deletes or puts away objects by itself: which of them would take a live checkpoint.

Decisions only; the storages bring the rules as their APIs give them ("GetBucketLifecycleConfiguration" of S3, and the
``lifecycle`` of a bucket of Google's). A checkpoint is live as long as the manifest says so, however old it is: no rule
by age can know that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["google_dangers", "s3_dangers"]

#: Storage classes of S3 whose objects have to be restored, for hours, before they can be read.
_COLD = {"GLACIER", "DEEP_ARCHIVE"}
#: Conditions of Google's that only old versions meet.
_NONCURRENT = {"daysSinceNoncurrentTime", "noncurrentTimeBefore", "numNewerVersions"}
#: How keys of ours end.
_ENDS = (".json", ".safetensors")


def _meet(rule: str, prefix: str) -> bool:
    """Whether a rule for keys that begin like this can meet a key below our prefix."""
    return rule.startswith(prefix) or prefix.startswith(rule)


def _ends(suffix: str) -> bool:
    """Whether a rule for keys that end like this can meet one of ours."""
    return any(end.endswith(suffix) or suffix.endswith(end) for end in _ENDS)


def s3_dangers(rules: Iterable[Mapping[str, Any]], prefix: str) -> list[str]:
    """What each enabled rule would do to current objects below ``prefix``; a sentence each, empty if nothing.

    Args:
        rules: ``Rules`` as the API gives them.
        prefix: the run's keys' beginning, with a slash at its end unless it is empty.
    """
    found = []
    for rule in rules:
        if rule.get("Status") != "Enabled" or not _s3_meets(rule, prefix):
            continue
        name = str(rule.get("ID", "without a name"))
        expiration = rule.get("Expiration") or {}
        if "Days" in expiration or "Date" in expiration:
            when = f"{expiration['Days']} days old" if "Days" in expiration else f"there on {expiration['Date']}"
            found.append(
                f"the bucket's lifecycle rule {name!r} deletes objects that are {when}, live checkpoints and the "
                "manifest among them: take this prefix out of it, or let it delete noncurrent versions only"
            )
        colder = sorted({str(t.get("StorageClass")) for t in rule.get("Transitions", ())} & _COLD)
        if colder:
            found.append(
                f"the bucket's lifecycle rule {name!r} moves objects to {', '.join(colder)}, from where they cannot be "
                "read without a restore: take this prefix out of it"
            )
    return found


def _s3_meets(rule: Mapping[str, Any], prefix: str) -> bool:
    chosen = rule.get("Filter") or {}
    both = chosen.get("And") or {}
    if chosen.get("Tag") or both.get("Tags"):
        return False  # our objects have no tags
    return _meet(str(both.get("Prefix") or chosen.get("Prefix") or rule.get("Prefix") or ""), prefix)


def google_dangers(rules: Iterable[Mapping[str, Any]], prefix: str) -> list[str]:
    """As ``s3_dangers``, for the ``rule`` list of a bucket's ``lifecycle``. All classes of Google's can be read."""
    found = []
    for number, rule in enumerate(rules):
        condition = rule.get("condition") or {}
        deletes = (rule.get("action") or {}).get("type") == "Delete"
        if not deletes or condition.get("isLive") is False or _NONCURRENT & condition.keys():
            continue
        if not any(_meet(str(begin), prefix) for begin in condition.get("matchesPrefix") or [""]):
            continue
        if not any(_ends(str(end)) for end in condition.get("matchesSuffix") or [""]):
            continue
        said = ", ".join(f"{name}={value}" for name, value in sorted(condition.items())) or "no condition"
        found.append(
            f"the bucket's lifecycle rule {number + 1} ({said}) deletes live objects, checkpoints and the manifest "
            "among them: take this prefix out of it, or add isLive=false"
        )
    return found
