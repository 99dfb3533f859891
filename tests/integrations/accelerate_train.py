"""A real ``Accelerator`` in a plain loop: by itself, or one rank of several."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cloudckpt import CheckpointManager
from cloudckpt.integrations.accelerate import load_state, save_state
from tests.integrations.training import classifier, die, digest, digits, hold, say, words


def main() -> None:
    """Train, and print what happened."""
    asked = words()
    accelerator = Accelerator(cpu=True)
    pixels, labels = digits()
    loader = DataLoader(TensorDataset(pixels[:512].float() / 16, labels[:512]), batch_size=16)
    plain = classifier()
    model, optimizer, loader = accelerator.prepare(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2), loader)
    with CheckpointManager(asked.root, monitor="loss", mode="min", keep_best=1, keep_last=2) as ckpts:
        resumed = load_state(accelerator, ckpts, f"{asked.work}/back")
        if accelerator.is_main_process:
            say("begins", 0 if resumed is None else resumed)
        batches = endless(loader)
        for _ in range(resumed or 0):
            next(batches)
        for step in range(1 if resumed is None else resumed + 1, asked.steps + 1):
            inputs, answers = next(batches)
            loss = nn.functional.cross_entropy(model(inputs), answers)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            if step % 5 == 0:
                save_state(accelerator, ckpts, step, metrics={"loss": loss.item()}, within=f"{asked.work}/staging")
            if step == asked.hold_after:
                ckpts.wait()
                hold()
            if step == asked.die_after:
                ckpts.wait()
                accelerator.wait_for_everyone()
                die()
    if accelerator.is_main_process:
        say("weights", digest(accelerator.unwrap_model(model)))
    accelerator.end_training()


def endless(loader: Any) -> Any:
    """Its batches, over and over."""
    while True:
        yield from loader


if __name__ == "__main__":
    main()
