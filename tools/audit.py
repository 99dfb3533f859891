"""Hold the installed dependencies, and the oldest ones that are allowed, against known vulnerabilities. Offline.

    python tools/audit.py                        against tools/advisories.json, which people keep
    python tools/audit.py --osv PyPI-all.zip     and against an export of the OSV database (osv.dev)

Nothing is downloaded and nothing is sent anywhere. Exit 1 if an installed version is known to be vulnerable in a way
that reaches this package, if pyproject.toml allows such a version, or if a tool of developers is not pinned.

With ``--osv`` every match is listed; those that are not in ``tools/advisories.json`` have to be judged by a person and
added there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).resolve().parent.parent
KNOWN = ROOT / "tools" / "advisories.json"
PROJECT = ROOT / "pyproject.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Advisory:
    """A vulnerability of versions before ``fixed``. ``reaches_us``: this package runs the code that has it."""

    id: str
    package: str
    fixed: str
    reaches_us: bool
    what: str
    source: str


def known(path: Path = KNOWN) -> list[Advisory]:
    """The advisories that people keep."""
    return [Advisory(**item) for item in json.loads(path.read_text(encoding="utf-8"))]


def closure(name: str, extras: Iterable[str]) -> dict[str, Version]:
    """Every installed distribution that a package needs with these extras, by canonical name."""
    found: dict[str, Version] = {}
    waiting: list[tuple[str, frozenset[str]]] = [(canonicalize_name(name), frozenset(extras))]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        item = waiting.pop()
        if item in seen:
            continue
        seen.add(item)
        try:
            distribution = importlib.metadata.distribution(item[0])
        except importlib.metadata.PackageNotFoundError:
            continue  # of an extra that is not installed here, or of another system
        found[item[0]] = Version(distribution.version)
        for text in distribution.requires or ():
            requirement = Requirement(text)
            if _applies(requirement, item[1]):
                waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return found


def _applies(requirement: Requirement, extras: Iterable[str]) -> bool:
    if requirement.marker is None:
        return True
    return any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras))


def installed(versions: dict[str, Version], advisories: Iterable[Advisory]) -> Iterator[str]:
    """What is wrong with what is installed."""
    for advisory in advisories:
        version = versions.get(canonicalize_name(advisory.package))
        if advisory.reaches_us and version is not None and version < Version(advisory.fixed):
            fixed = f"{advisory.id}, fixed in {advisory.fixed}"
            yield f"{advisory.package} {version} is installed: {fixed}: {advisory.what}"


def floors(requirements: Iterable[str], advisories: Iterable[Advisory]) -> Iterator[str]:
    """What is wrong with the oldest versions that are allowed."""
    parsed = [Requirement(text) for text in requirements]
    for advisory in advisories:
        for requirement in parsed:
            if not advisory.reaches_us or canonicalize_name(requirement.name) != canonicalize_name(advisory.package):
                continue
            lowest = [Version(s.version) for s in requirement.specifier if s.operator in {">=", "==", "~="}]
            if not lowest or max(lowest) < Version(advisory.fixed):
                yield f"{requirement} allows {advisory.id}: ask for >={advisory.fixed} ({advisory.what})"


def unpinned(requirements: Iterable[str]) -> Iterator[str]:
    """Tools of developers that may change under them."""
    for requirement in map(Requirement, requirements):
        if not any(specifier.operator == "==" for specifier in requirement.specifier):
            yield f"{requirement} is a tool of developers and is not pinned: write {requirement.name}==…"


def of_osv(path: Path, versions: dict[str, Version]) -> Iterator[str]:
    """The records of an OSV export (a zip of JSON files) that an installed version is affected by, a line each."""
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            record = json.loads(archive.read(name))
            for affected in record.get("affected", ()):
                package = affected.get("package", {})
                version = versions.get(canonicalize_name(str(package.get("name", ""))))
                if package.get("ecosystem") == "PyPI" and version is not None and _is_affected(affected, version):
                    names = ", ".join([record["id"], *record.get("aliases", ())])
                    yield f"{package['name']} {version}: {names}: {record.get('summary', 'no summary')}"


def _is_affected(affected: dict[str, object], version: Version) -> bool:
    listed = affected.get("versions")
    if isinstance(listed, list) and str(version) in listed:
        return True
    ranges = affected.get("ranges")
    return any(_in_range(item, version) for item in (ranges if isinstance(ranges, list) else ()))


def _in_range(found: dict[str, object], version: Version) -> bool:
    events = found.get("events")
    if found.get("type") != "ECOSYSTEM" or not isinstance(events, list):
        return False
    inside = False
    for event in events:
        for kind, text in event.items():
            try:
                at = Version("0" if text == "0" else text)
            except InvalidVersion:
                continue
            if kind == "introduced" and version >= at:
                inside = True
            elif (kind == "fixed" and version >= at) or (kind == "last_affected" and version > at):
                inside = False
    return inside


def audit(osv: Path | None = None) -> tuple[list[str], list[str]]:
    """What must be mended, and what a person has to judge."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    advisories = known()
    versions = closure(project["name"], extras)
    allowed = [*project["dependencies"], *(text for texts in extras.values() for text in texts)]
    wrong = [*installed(versions, advisories), *floors(allowed, advisories), *unpinned(extras.get("dev", ()))]
    judged = {advisory.id for advisory in advisories}
    open_ = [line for line in (of_osv(osv, versions) if osv else ()) if not any(name in line for name in judged)]
    return wrong, open_


def main() -> int:
    """Audit, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--osv", type=Path, help="an export of the OSV database for PyPI, as a zip")
    wrong, open_ = audit(parser.parse_args().osv)
    for line in wrong:
        print(line)
    for line in open_:
        print(f"to be judged: {line}")
    print(f"{len(known())} advisories are known here; {len(wrong)} findings, {len(open_)} to be judged")
    return 1 if wrong or open_ else 0


if __name__ == "__main__":
    sys.exit(main())
