"""A real Ignite engine with its ``Checkpoint`` handler."""

from __future__ import annotations

from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cloudckpt import CheckpointManager
from cloudckpt.integrations.ignite import CloudSaver
from tests.integrations.training import classifier, digest, digits, hold, say, words


def main() -> None:
    """Train, and print what happened."""
    asked = words()
    pixels, labels = digits()
    loader = DataLoader(TensorDataset(pixels[:80].float() / 16, labels[:80]), batch_size=16)  # five steps an epoch
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(engine: Engine, batch: Any) -> float:
        inputs, answers = batch
        loss = nn.functional.cross_entropy(model(inputs), answers)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        optimizer.step()
        return loss.item()

    trainer = Engine(step)

    def keep_loss(engine: Engine) -> None:
        engine.state.metrics["loss"] = engine.state.output

    def wait_to_be_killed(engine: Engine) -> None:
        if engine.state.iteration == asked.hold_after:
            ckpts.wait()
            hold()

    trainer.add_event_handler(Events.ITERATION_COMPLETED, keep_loss)
    with CheckpointManager(asked.root, monitor="loss", mode="min", keep_best=1, keep_last=2) as ckpts:
        handler = CloudSaver(ckpts, trainer)
        to_save = {"model": model, "optimizer": optimizer, "trainer": trainer}
        trainer.add_event_handler(Events.EPOCH_COMPLETED, Checkpoint(to_save, handler, n_saved=None))
        trainer.add_event_handler(Events.EPOCH_COMPLETED, wait_to_be_killed)
        if (values := handler.load()) is not None:
            Checkpoint.load_objects(to_load=to_save, checkpoint=values)
        say("begins", trainer.state.iteration)
        trainer.run(loader, max_epochs=asked.steps // 5)
    say("weights", digest(model))


if __name__ == "__main__":
    main()
