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

    def measure(engine: Engine, batch: Any) -> float:
        inputs, answers = batch
        with torch.no_grad():
            return nn.functional.cross_entropy(model(inputs), answers).item()

    evaluator = Engine(measure)
    held_out = DataLoader(TensorDataset(pixels[1500:1564].float() / 16, labels[1500:1564]), batch_size=64)

    def keep_val_loss(engine: Engine) -> None:
        engine.state.metrics["val_loss"] = engine.state.output

    def evaluate(engine: Engine) -> None:
        evaluator.run(held_out)

    def keep_loss(engine: Engine) -> None:
        engine.state.metrics["loss"] = engine.state.output

    def wait_to_be_killed(engine: Engine) -> None:
        if engine.state.iteration == asked.hold_after:
            ckpts.wait()
            hold()

    trainer.add_event_handler(Events.ITERATION_COMPLETED, keep_loss)
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, keep_val_loss)
    with CheckpointManager(asked.root, monitor="loss", mode="min", keep_best=1, keep_last=2) as ckpts:
        handler = CloudSaver(ckpts, trainer, evaluator)
        to_save = {"model": model, "optimizer": optimizer, "trainer": trainer}
        trainer.add_event_handler(Events.EPOCH_COMPLETED, Checkpoint(to_save, handler, n_saved=None))
        if asked.evaluate:
            trainer.add_event_handler(Events.EPOCH_COMPLETED(every=asked.evaluate), evaluate)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, wait_to_be_killed)
        if (values := handler.load()) is not None:
            Checkpoint.load_objects(to_load=to_save, checkpoint=values)
        say("begins", trainer.state.iteration)
        trainer.run(loader, max_epochs=asked.steps // 5)
    say("weights", digest(model))


if __name__ == "__main__":
    main()
