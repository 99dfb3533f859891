"""A real Ray Train run with one worker, on a cluster of this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch import nn

from tests.integrations.training import say, words


def train(config: dict[str, Any]) -> None:
    """What the worker does; when Ray starts it again, it does the same."""
    from cloudckpt import CheckpointManager
    from cloudckpt.integrations.ray import report
    from tests.integrations.training import classifier, die, digits

    pixels, labels = digits()
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state: dict[str, object] = {"model": model, "optimizer": optimizer}
    with CheckpointManager(config["root"], monitor="loss", mode="min", keep_best=1, keep_last=2) as ckpts:
        resumed = ckpts.restore(state)
        begins = resumed.step if resumed else 0
        with Path(config["work"], "begins.txt").open("a") as notes:
            notes.write(f"begins {begins}\n")
        for step in range(begins + 1, config["steps"] + 1):
            loss = nn.functional.cross_entropy(model(pixels[:64].float() / 16), labels[:64])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own
            optimizer.step()
            if step % 5 == 0:
                report(ckpts, step, state, {"loss": loss.item()}).wait()
            if step == config["die_after"] and not resumed:
                die()


def main(asked: argparse.Namespace) -> None:
    """Run it, and print how it ended."""
    Path(asked.work).mkdir()
    ray.init(num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1")
    trainer = TorchTrainer(
        train,
        train_loop_config={
            "root": asked.root,
            "work": asked.work,
            "steps": asked.steps,
            "die_after": asked.die_after,
        },
        scaling_config=ScalingConfig(num_workers=1, use_gpu=False),
        run_config=RunConfig(
            name="digits", storage_path=str(Path(asked.work, "storage")), failure_config=FailureConfig(max_failures=1)
        ),
    )
    result = trainer.fit()
    say("ended", result.error)
    ray.shutdown()


if __name__ == "__main__":
    main(words())
