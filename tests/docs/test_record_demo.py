"""The picture of the demonstration shows what it printed."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree as ET

import pytest
import torch

from cloudckpt import CheckpointManager
from tests.tooling import tool_module

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recording() -> ModuleType:
    """The tool."""
    return tool_module("record_demo")


def test_the_parts_are_what_the_demonstration_says(recording: ModuleType) -> None:
    """The reference run is left out, and each heading begins a part; the headings looked for are those of the program."""
    text = "\n--- the reference\na\n\n--- training into ./x\nb\n\n\x1b[1mc\x1b[0m\n--- the listing\nd\n"
    assert recording.parts(text) == [["--- training into ./x", "b", "\x1b[1mc\x1b[0m"], ["--- the listing", "d"]]
    program = (ROOT / "examples" / "demo.py").read_text(encoding="utf-8")
    assert recording.FIRST.removeprefix("--- ") in program
    assert 'print(f"\\n--- {text}", flush=True)' in program


def test_long_parts_say_what_is_missing(recording: ModuleType) -> None:
    """A part of too many lines has its first and its last ones, and the number of those between them."""
    lines = [str(number) for number in range(30)]
    assert recording.shortened(lines[:10], most=10) == lines[:10]
    assert recording.shortened(lines, most=5) == ["0", "1", "⋮ 26 lines", "28", "29"]


def test_the_picture_is_an_svg_of_these_lines(recording: ModuleType) -> None:
    """The picture is well-formed, has the text in it, loads nothing from elsewhere, and is the same each time."""
    drawn = recording.picture(["\x1b[32mok\x1b[0m  saved", "--- the end"])
    words = "".join(ET.fromstring(drawn).itertext()).replace("\xa0", " ")
    assert "saved" in words
    assert "--- the end" in words
    assert "@font-face" not in drawn
    assert "url(" not in drawn.replace("url(#", "")
    assert recording.picture(["\x1b[32mok\x1b[0m  saved", "--- the end"]) == drawn


@pytest.mark.parametrize(("command", "shown"), [("ls", "KEPT BECAUSE"), ("plot", "loss of")])
def test_a_command_can_be_recorded_as_well(recording: ModuleType, tmp_path: Path, command: str, shown: str) -> None:
    """What the command prints in a terminal that shows colours, below the command as it was typed."""
    run = tmp_path / "run"
    with CheckpointManager(run, monitor="loss", mode="min") as ckpts:
        for step, loss in enumerate([0.5, 0.2, 0.3]):
            ckpts.save(step, {"w": torch.zeros(2)}, metrics={"loss": loss}, block=True)
    text = recording.run_command(f"cloudckpt {command} {run}")
    assert text.startswith(f"$ cloudckpt {command} {run}\n")
    assert "\x1b[" in text
    words = "".join(ET.fromstring(recording.picture(text.splitlines(), title=command)).itertext())
    assert shown in words.replace("\xa0", " ")
