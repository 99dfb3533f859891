"""What the trainings of the tests have in common: real data, a tiny model's digest, and the command line.

The data are the 1,797 scanned digits that come with scikit-learn (UCI ML hand-written digits, CC BY 4.0): 8 x 8 pixels
with values from 0 to 16.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import sys

import torch
from sklearn.datasets import load_digits
from torch import nn


def words() -> argparse.Namespace:
    """The command line of every training."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--top-k", type=int, default=0, help="let Lightning say when to save")
    parser.add_argument("--pin", type=int, default=0, help="pin the checkpoint of this step once it is saved")
    parser.add_argument("--every", type=int, default=0, help="save every so many steps, not at the end of each epoch")
    parser.add_argument("--evaluate", type=int, default=0, help="measure after every so many epochs, once it is saved")
    parser.add_argument("--wrapped", action="store_true", help="put Lightning's AsyncCheckpointIO around the plugin")
    parser.add_argument("--ckpt-path", default="", help="what Lightning is to go on from, instead of the newest")
    parser.add_argument("--hold-after", type=int, default=0, help="stop before the step after this one, for ever")
    parser.add_argument("--die-after", type=int, default=0, help="be killed before the step after this one")
    parser.add_argument("--explode-after", type=int, default=0, help="the weights become no numbers there")
    torch.set_num_threads(1)
    return parser.parse_args()


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels as whole numbers from 0 to 16, one row for each digit; and the digits."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.long), torch.tensor(labels, dtype=torch.long)


def classifier() -> nn.Module:
    """A tiny model of the digits, the same at each call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def say(name: str, what: object = "") -> None:
    """A line for the test that listens."""
    print(f"{name} {what}".strip(), flush=True)


def hold() -> None:
    """Say so, and wait for the end of the input, which is the end of this process."""
    say("held")
    sys.stdin.read()


def die() -> None:
    """End this very process as the kernel would: no handler runs, nothing is flushed."""
    os.kill(os.getpid(), signal.SIGKILL)


def digest(model: nn.Module) -> str:
    """Of all weights, bit for bit."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
