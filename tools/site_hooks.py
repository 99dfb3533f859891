"""What MkDocs is told besides ``mkdocs.yml``: which pages a pattern names, and where links out of ``docs/`` lead.

The documents are read in two places: in the repository, where ``../../examples/train.py`` is a file, and in the site,
which has ``docs/`` alone. So whatever file of the repository a page links to becomes part of the site, below
``repository/``, and the link leads there; a document outside of ``docs/`` becomes a page, with its own links.

In ``nav`` a pattern such as ``adr/*.md`` names every page of that folder that no other entry names, in alphabetical
order, so that a new page needs no entry.
"""

from __future__ import annotations

import fnmatch
import posixpath
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).resolve().parent.parent
DOCS = "docs"
#: Where files of the repository that are not below docs/ are in the site.
OUTSIDE = "repository"
_LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")


# -- nav -------------------------------------------------------------------------------------------------------


def expanded(nav: Sequence[Any], pages: Sequence[str]) -> list[Any]:
    """``nav`` with the pages that each pattern names in its place."""
    named = set(_leaves(nav))

    def walk(entries: Sequence[Any]) -> Iterator[Any]:
        for entry in entries:
            if isinstance(entry, str) and "*" in entry:
                yield from (page for page in pages if _matches(page, entry) and page not in named)
            elif isinstance(entry, dict):
                yield {title: list(walk(below)) if isinstance(below, list) else below for title, below in entry.items()}
            else:
                yield entry

    return list(walk(nav))


def _leaves(nav: Sequence[Any]) -> Iterator[str]:
    for entry in nav:
        below = entry.values() if isinstance(entry, dict) else [entry]
        for value in below:
            if isinstance(value, list):
                yield from _leaves(value)
            else:
                yield str(value)


def _matches(page: str, pattern: str) -> bool:
    # A star stays within its folder.
    same_folder = posixpath.dirname(page) == posixpath.dirname(pattern)
    return same_folder and fnmatch.fnmatchcase(posixpath.basename(page), posixpath.basename(pattern))


# -- links -----------------------------------------------------------------------------------------------------


def place_of(uri: str) -> str:
    """Where in the repository the source of a page is."""
    return uri.removeprefix(f"{OUTSIDE}/") if uri.startswith(f"{OUTSIDE}/") else f"{DOCS}/{uri}"


def uri_of(place: str) -> str:
    """Where in the site a file or folder of the repository is."""
    return place.removeprefix(f"{DOCS}/") if place.startswith(f"{DOCS}/") else f"{OUTSIDE}/{place}"


def _target(place: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(place), link))


def outside(text: str, place: str) -> list[str]:
    """The files and folders outside of ``docs/`` that a document at ``place`` links to, as places."""
    targets = [_target(place, match[2]) for match in _LINK.finditer(text)]
    return [t for t in dict.fromkeys(targets) if not t.startswith((f"{DOCS}/", ".")) and (ROOT / t).exists()]


def led(text: str, place: str) -> str:
    """A document with every link that leaves ``docs/``, or comes back into it, leading to its place in the site."""

    def replaced(match: re.Match[str]) -> str:
        target = _target(place, match[2])
        stays_within = place.startswith(f"{DOCS}/") and target.startswith(f"{DOCS}/")
        if stays_within or not (ROOT / target).exists():
            return match[0]  # right as it is; or wrong, which MkDocs will say
        uri = uri_of(target) + ("/index.md" if (ROOT / target).is_dir() else "")
        return f"{match[1]}{posixpath.relpath(uri, posixpath.dirname(uri_of(place)))}{match[3] or ''}{match[4]}"

    return _LINK.sub(replaced, text)


def listing(place: str) -> str:
    """The page that stands for a folder of the repository."""
    names = sorted(path.name for path in (ROOT / place).iterdir() if path.is_file())
    return f"# {place}\n\n" + "".join(f"- [{name}]({name})\n" for name in names)


# -- events of MkDocs ------------------------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    """Put pages in place of the patterns in ``nav``."""
    docs = Path(config["docs_dir"])
    config["nav"] = expanded(config["nav"], sorted(path.relative_to(docs).as_posix() for path in docs.rglob("*.md")))
    return config


def on_files(files: Any, *, config: Any) -> Any:
    """Add what the pages link to outside of ``docs/``, and what that links to."""
    waiting = [place_of(file.src_uri) for file in files.documentation_pages()]
    while waiting:
        place = waiting.pop()
        for found in outside((ROOT / place).read_text(encoding="utf-8"), place):
            waiting += _add(files, config, found)
    return files


def _add(files: Any, config: Any, place: str) -> list[str]:
    """Add a file, or a folder's listing and its files. Returns the documents that are new."""
    path, uri = ROOT / place, uri_of(place)
    if path.is_dir():
        index = f"{uri}/index.md"
        if files.get_file_from_path(index) is None:
            files.append(File.generated(config, index, content=listing(place), inclusion=InclusionLevel.NOT_IN_NAV))
        below = [f"{place}/{found.name}" for found in sorted(path.iterdir()) if found.is_file()]
        return [new for found in below for new in _add(files, config, found)]
    if files.get_file_from_path(uri) is not None:
        return []
    files.append(File.generated(config, uri, abs_src_path=str(path), inclusion=InclusionLevel.NOT_IN_NAV))
    return [place] if place.endswith(".md") else []


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Let links lead to where things are in the site."""
    return led(markdown, place_of(page.file.src_uri))
