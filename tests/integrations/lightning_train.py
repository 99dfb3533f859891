"""A real Lightning ``Trainer``: five steps make an epoch, and each epoch ends with a validation."""

from __future__ import annotations

import logging
import sys
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cloudckpt import DivergenceDetector
from cloudckpt.integrations.lightning import CloudCheckpoint, CloudCheckpointIO
from tests.integrations.training import classifier, digest, digits, hold, say, words


class Classifier(pl.LightningModule):
    """A tiny model of the digits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = classifier()

    def _loss(self, batch: Any) -> torch.Tensor:
        pixels, labels = batch
        return nn.functional.cross_entropy(self.layers(pixels / 16), labels)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self._loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Watch(pl.Callback):
    """Says where training begins, holds it, and spoils it."""

    def __init__(self, cloud: CloudCheckpoint, hold_after: int, explode_after: int) -> None:
        self._cloud, self._hold_after, self._explode_after = cloud, hold_after, explode_after

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        say("begins", trainer.global_step)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._hold_after and trainer.global_step == self._hold_after:
            self._cloud.io.ckpts.wait()
            hold()
        if self._explode_after and trainer.global_step == self._explode_after:
            with torch.no_grad():
                for parameter in pl_module.parameters():
                    parameter.fill_(float("nan"))


class Released(CloudCheckpointIO):
    """Says what Lightning wants to be removed."""

    def remove_checkpoint(self, path: Any) -> None:
        say("removes", path)
        super().remove_checkpoint(path)


class Pin(pl.Callback):
    """Pins the checkpoint of a step before the next one is made."""

    def __init__(self, io: CloudCheckpointIO, step: int) -> None:
        self._io, self._step = io, step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._step and trainer.global_step == self._step:
            self._io.ckpts.pin(self._step)


def with_model_checkpoint(asked: Any) -> None:
    """Lightning's own callback over our plugin: it says when, and lets go of what the run keeps."""
    work = asked.work
    saver = pl.callbacks.ModelCheckpoint(dirpath=f"{work}/ckpts", monitor="val_loss", save_top_k=asked.top_k)
    # Without a pin all is kept; with one, what is neither it nor the newest is let go of.
    io = Released(asked.root, monitor="val_loss", mode="min", keep_best=1, keep_last=1 if asked.pin else None)
    trainer = pl.Trainer(
        max_steps=asked.steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=work,
        callbacks=[saver, Pin(io, asked.pin)],
        plugins=[io],
    )
    model = Classifier()
    trainer.fit(model, *loaders())
    say("top", saver.best_model_path.rpartition("/")[2])
    say("score", f"{float(saver.best_model_score):.6f}")
    (measured,) = trainer.validate(model, loaders()[1], ckpt_path=saver.best_model_path, verbose=False)
    say("validated", f"{measured['val_loss']:.6f}")


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    """In their order: where an epoch begins, Lightning begins the data anew."""
    pixels, labels = digits()
    train = DataLoader(TensorDataset(pixels[:80].float(), labels[:80]), batch_size=16)
    return train, DataLoader(TensorDataset(pixels[1500:1564].float(), labels[1500:1564]), batch_size=64)


def main() -> None:
    """Train, and print what happened."""
    asked = words()
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    logging.getLogger("cloudckpt").setLevel(logging.INFO)
    pl.seed_everything(0)
    if asked.top_k:
        with_model_checkpoint(asked)
        return
    detector = DivergenceDetector("val_loss", "min") if asked.explode_after else None
    cloud = CloudCheckpoint(
        asked.root,
        every_n_train_steps=asked.every or None,
        divergence=detector,
        monitor="val_loss",
        mode="min",
        keep_best=1,
        keep_last=2,
    )
    trainer = pl.Trainer(
        max_steps=asked.steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=asked.work,
        callbacks=[cloud, Watch(cloud, asked.hold_after, asked.explode_after)],
        plugins=[pl.plugins.AsyncCheckpointIO(cloud.io) if asked.wrapped else cloud.io],
    )
    model = Classifier()
    latest = asked.ckpt_path or cloud.latest()
    say("latest", latest)
    trainer.fit(model, *loaders(), ckpt_path=latest)
    say("ended", trainer.global_step)
    say("weights", digest(model))
    say("best", cloud.best_model_path)


if __name__ == "__main__":
    main()
