"""Record ``make demo`` as a picture of a terminal: the demonstration runs, and what it printed becomes an SVG.

    python tools/record_demo.py                  writes docs/pictures/demo.svg and prints the line for the README
    python tools/record_demo.py --command "cloudckpt ls ./runs/demo" --output ls.svg     the same of one command

It runs in a temporary folder. What it prints is changed in three ways only: that folder is written as ``.``; blank
lines and the reference run before the demonstration proper are left out; and a part longer than a few lines is cut in
its middle, where a line says how many are missing.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "pictures" / "demo.svg"
#: The line that the picture begins with.
FIRST = "--- training into"
#: Lines of a part, its heading not counted; more are cut.
MOST_LINES = 10
#: Columns; what is longer goes on in the next line, as in a terminal.
MOST_COLUMNS = 120
_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
_FONT = re.compile(r"\s*@font-face \{.*?\}", re.DOTALL)


def run_demo() -> str:
    """What the demonstration prints, colours included.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {**_on_a_terminal(), "TMPDIR": folder}  # so that no other place is named either
        command = [sys.executable, str(ROOT / "examples" / "demo.py"), "--root", "./runs/demo"]
        done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        places = {folder, str(Path(folder).resolve())}
    text = done.stdout
    for place in sorted(places, key=len, reverse=True):
        text = text.replace(place, ".")
    return text


def run_command(line: str) -> str:
    """A command as it is typed, and below it what it prints on a terminal, colours included.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    words = shlex.split(line)
    program = [sys.executable, "-m", "cloudckpt", *words[1:]] if words[0] == "cloudckpt" else words
    done = subprocess.run(program, env=_on_a_terminal(), stdout=subprocess.PIPE, text=True, check=True)
    return f"$ {line}\n{done.stdout}"


def _on_a_terminal() -> dict[str, str]:
    """This environment, as it is in a terminal that shows colours."""
    inherited = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    return {**inherited, "COLUMNS": str(MOST_COLUMNS), "FORCE_COLOR": "1", "TERM": "xterm-256color"}


def parts(text: str) -> list[list[str]]:
    """The output in parts that begin with ``---``, from ``FIRST`` on, without blank lines."""
    found: list[list[str]] = []
    for line in text.splitlines():
        plain = _ESCAPE.sub("", line)
        if plain.startswith("--- ") and (found or plain.startswith(FIRST)):
            found.append([line])
        elif found and plain.strip():
            found[-1].append(line)
    return found


def shortened(lines: Sequence[str], *, most: int = MOST_LINES) -> list[str]:
    """A part's lines, at most so many of them: the first and the last ones, and how many are between them."""
    if len(lines) <= most:
        return list(lines)
    head = most // 2
    tail = most - head - 1
    return [*lines[:head], f"⋮ {len(lines) - head - tail} lines", *lines[len(lines) - tail :]]


def picture(lines: Sequence[str], *, title: str = "make demo") -> str:
    """An SVG of a terminal that shows these lines. It names no font of another host."""
    width = min(MOST_COLUMNS, max(len(_ESCAPE.sub("", line)) for line in lines))
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.from_ansi("\n".join([*lines, ""])))  # the picture cuts the feet off its last line
    # Equal output gives an equal file.
    return _FONT.sub("", console.export_svg(title=title, unique_id="demo"))


def write(target: Path, svg: str) -> None:
    """Into a folder that need not be there yet."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(svg, encoding="utf-8", newline="\n")


def main() -> None:
    """Run the demonstration and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=TARGET, help="the file to write")
    parser.add_argument("--command", help="record this command instead")
    asked = parser.parse_args()
    target: Path = asked.output
    if asked.command is not None:
        if target == TARGET:
            parser.error("--command: say with --output which file to write")
        write(target, picture(run_command(asked.command).splitlines(), title=asked.command))
        print(f"wrote {target}")
        return
    lines = [line for heading, *rest in parts(run_demo()) for line in (heading, *shortened(rest))]
    if not lines:
        raise SystemExit(f"the demonstration printed no line that begins with {FIRST!r}: nothing to draw")
    write(target, picture(lines))
    print(f"wrote {target} ({len(lines)} lines); in the README:")
    print("![A run is killed in mid-save, resumed, and compared](docs/pictures/demo.svg)")


if __name__ == "__main__":
    main()
