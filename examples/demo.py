"""The demonstration behind ``make demo``: a training run is killed in the middle of a save, and loses nothing.

1. ``examples/train.py`` runs to its end without interruption, into a temporary folder: the reference.
2. The same training runs into ROOT and is killed with SIGKILL while a checkpoint is being uploaded.
3. The very same command line is started again; it resumes, finishes, and prints its summary.
4. The final weights of both runs are compared, bit for bit, and the listing is printed.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cloudckpt
from cloudckpt import State

TRAIN = Path(__file__).with_name("train.py")
SAVES_BEFORE_THE_KILL = 4
ATTEMPTS = 20


def say(text: str) -> None:
    print(f"\n--- {text}", flush=True)


def train_to_the_end(root: str) -> None:
    subprocess.run([sys.executable, str(TRAIN), "--root", root], check=True)


def kill_in_mid_save(root: str) -> cloudckpt.Checkpoint | None:
    """Start the training, kill it while it uploads; the save that was hit, or None if the training ended first."""
    run = cloudckpt.open(root)
    with subprocess.Popen([sys.executable, str(TRAIN), "--root", root], stdout=subprocess.PIPE, text=True) as process:
        if process.stdout is None:
            raise RuntimeError("the training has no output to watch")
        saves = 0
        for line in process.stdout:
            print(line, end="", flush=True)
            saves += line.startswith("saving checkpoint-")
            if line.startswith("saving checkpoint-") and saves >= SAVES_BEFORE_THE_KILL:
                process.kill()
                break
        process.wait()
    pending = run.checkpoints(state=State.PENDING)
    return pending[-1] if pending else None


def weights_digest(root: str) -> tuple[int, str]:
    """The step of the newest checkpoint and a SHA-256 over every weight's bytes."""
    run = cloudckpt.open(root)
    newest = run.latest()
    if newest is None:
        raise SystemExit(f"{root} has no checkpoint")
    model = run.load(newest.name, components=["model"])["model"]
    digest = hashlib.sha256()
    for name in sorted(model):
        digest.update(name.encode())
        digest.update(model[name].contiguous().numpy().tobytes())
    return newest.step, digest.hexdigest()


def refuse_used_root(root: str) -> None:
    try:
        used = bool(cloudckpt.open(root).checkpoints(state=None))
    except cloudckpt.FormatError as exc:
        raise SystemExit(f"{root} cannot be used for the demo: {exc}") from exc
    if used:
        raise SystemExit(
            f"{root} already holds a run and the demo starts from nothing. Choose another root (make demo ROOT=...), "
            f"or remove that one yourself"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="./runs/demo")
    root: str = parser.parse_args().root
    refuse_used_root(root)
    began = time.monotonic()

    with tempfile.TemporaryDirectory() as reference:
        say("the reference: the same training without interruption")
        train_to_the_end(reference)
        expected = weights_digest(reference)

    say(f"training into {root}, to be killed in the middle of a save")
    hit = None
    for _ in range(ATTEMPTS):
        hit = kill_in_mid_save(root)
        if hit is not None:
            break
        print("(the save was quicker than the kill; starting again)")
    if hit is None:
        raise SystemExit("every save was quicker than the kill: nothing was shown")
    say(f"killed with SIGKILL while {hit.name} was being saved. The listing as a laptop sees it now:")
    subprocess.run([sys.executable, "-m", "cloudckpt", "ls", root], check=True)

    say("the very same command line again")
    train_to_the_end(root)

    say("the listing")
    subprocess.run([sys.executable, "-m", "cloudckpt", "ls", root], check=True)
    subprocess.run([sys.executable, "-m", "cloudckpt", "verify", root, "--deep"], check=True)
    print(cloudckpt.open(root).get_best_checkpoints_summary())

    found = weights_digest(root)
    if found != expected:
        raise SystemExit(f"the interrupted run ended at {found}, the reference at {expected}: they differ")
    say(f"bit for bit equal: both runs ended at step {found[0]} with weights sha256 {found[1][:16]}…")
    print(f"(the demo took {time.monotonic() - began:.0f} s)")


if __name__ == "__main__":
    main()
