"""How long the command line takes: seconds of whole commands on a small local run, beside Python's own start.

    python benchmarks/start.py --rounds 21

A line for each command with the median and the slowest; the commands are taken in turn, round after round. The files
are in the page cache from the second round on, as they are for whoever uses the program at all.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from cloudckpt import CheckpointManager

CHECKPOINTS = 10


def made(root: Path) -> None:
    """A closed run of ten checkpoints at ``root``."""
    with CheckpointManager(root, monitor="loss", mode="min", keep_last=None) as ckpts:
        for step in range(CHECKPOINTS):
            ckpts.save(step, {"w": torch.zeros(1)}, metrics={"loss": 1 / (step + 1)})


def seconds(words: list[str]) -> float:
    """How long a command takes from its start to its end."""
    began = time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    """Time each command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    rounds = parser.parse_args().rounds
    program = str(Path(sys.executable).with_name("cloudckpt"))
    with tempfile.TemporaryDirectory() as folder:
        made(root := Path(folder) / "run")
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "cloudckpt --version": [program, "--version"],
            "cloudckpt --help": [program, "--help"],
            **{f"cloudckpt {name} ROOT": [program, name, str(root)] for name in ("ls", "latest", "verify", "gc")},
        }
        commands["cloudckpt latest ROOT"][2:] = ["-r", str(root)]
        commands["cloudckpt gc ROOT"].append("--dry-run")
        times: dict[str, list[float]] = defaultdict(list)
        for _ in range(rounds):
            for name, words in commands.items():
                times[name].append(seconds(words))
    for name, found in times.items():
        print(f"{name:24}  median {statistics.median(found):.3f} s, slowest {max(found):.3f} s, {rounds} rounds")


if __name__ == "__main__":
    main()
