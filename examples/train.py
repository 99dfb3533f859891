"""Train a small transformer on Python's own language reference, letter by letter, and keep its checkpoints.

The text is the help of the interpreter itself (``pydoc_data``, part of CPython, PSF License Version 2), so nothing is
downloaded. Start it, kill it whenever you like, start it again by the same command line: it goes on where it
was, and ends with the very same weights.

    python examples/train.py --root ./runs/demo
"""

from __future__ import annotations

import argparse
import logging
import sys
from pydoc_data.topics import topics

import torch
from torch import nn
from torch.nn import functional

from cloudckpt import CheckpointManager

CONTEXT = 64
BATCH = 16


class Reader:
    """Gives random pieces of a text; where it stands is its generator's state, so that it can be resumed."""

    def __init__(self, tokens: torch.Tensor, seed: int) -> None:
        self.tokens = tokens
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        starts = torch.randint(len(self.tokens) - CONTEXT - 1, (BATCH,), generator=self.generator)
        rows = torch.stack([self.tokens[start : start + CONTEXT + 1] for start in starts])
        return rows[:, :-1], rows[:, 1:]

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.generator.set_state(state["generator"])


class TorchRandom:
    """torch's own random numbers: dropout goes on as if nothing had happened."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"cpu": torch.get_rng_state()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        torch.set_rng_state(state["cpu"])


class Transformer(nn.Module):
    """A causal language model; the output layer shares its weights with the embedding."""

    def __init__(self, letters: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(letters, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.position = nn.Parameter(torch.randn(CONTEXT, width) * 0.02)
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, letters, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens) * self.embedding.embedding_dim**0.5 + self.position
        logits: torch.Tensor = self.head(self.blocks(hidden, mask=self.mask, is_causal=True))
        return logits


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    inputs, targets = batch
    return functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, held_out: torch.Tensor) -> float:
    model.eval()
    reader = Reader(held_out, seed=1)
    value = sum(loss_of(model, reader.batch()).item() for _ in range(4)) / 4
    model.train()
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="./runs/demo", help="where the checkpoints go: a folder or a URL")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)

    # One thread, so that sums are made in one order and two runs agree to the last bit.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(mode=True)
    torch.manual_seed(args.seed)

    text = "".join(topics[name] for name in sorted(topics))
    alphabet = sorted(set(text))
    tokens = torch.tensor([alphabet.index(letter) for letter in text[:300_000]])
    train, held_out = tokens[:-30_000], tokens[-30_000:]

    model = Transformer(len(alphabet), args.width, args.layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    reader = Reader(train, args.seed)
    state = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "reader": reader,
        "random": TorchRandom(),
    }
    with CheckpointManager(args.root, monitor="val_loss", mode="min", keep_best=2, keep_last=3) as ckpts:
        resumed = ckpts.restore(state)
        for step in range(resumed.step + 1 if resumed else 0, args.steps):
            loss = loss_of(model, reader.batch())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
            scheduler.step()
            if (step + 1) % args.save_every == 0:
                ckpts.save(step, state, metrics={"val_loss": evaluate(model, held_out), "loss": loss.item()})


if __name__ == "__main__":
    main()
