"""A real ``transformers.Trainer``: a tiny BERT that reads a digit's pixels as 64 words."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from cloudckpt import DivergenceDetector
from cloudckpt.integrations.hf import CloudCheckpointCallback
from tests.integrations.training import digest, digits, hold, say, words


class Digits(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows of the data, as the trainer wants them."""

    def __init__(self, pixels: torch.Tensor, labels: torch.Tensor) -> None:
        self._pixels, self._labels = pixels, labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"input_ids": self._pixels[number], "labels": self._labels[number]}


class Watch(TrainerCallback):
    """Says where training begins, holds it, and spoils it."""

    def __init__(self, cloud: CloudCheckpointCallback, hold_after: int, explode_after: int) -> None:
        self._cloud, self._hold_after, self._explode_after = cloud, hold_after, explode_after

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        say("begins", state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._hold_after and state.global_step == self._hold_after:
            self._cloud.ckpts.wait()
            hold()
        if self._explode_after and state.global_step == self._explode_after:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(float("nan"))


def main() -> None:
    """Train, and print what happened."""
    asked = words()
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    logging.getLogger("cloudckpt").setLevel(logging.INFO)
    set_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=17,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
            num_labels=10,
        )
    )
    pixels, labels = digits()
    work = Path(asked.work, "out")
    args = TrainingArguments(
        output_dir=str(work),
        max_steps=asked.steps,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        eval_strategy="steps",
        eval_steps=5,
        save_strategy="steps",
        save_steps=5,
        save_total_limit=1,
        metric_for_best_model="loss",
        greater_is_better=False,
        report_to="none",
        use_cpu=True,
        seed=0,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    detector = DivergenceDetector("eval_loss", "min") if asked.explode_after else None
    cloud = CloudCheckpointCallback(asked.root, keep_best=1, keep_last=2, divergence=detector)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=Digits(pixels[:1500], labels[:1500]),
        eval_dataset=Digits(pixels[1500:1564], labels[1500:1564]),
        callbacks=[cloud, Watch(cloud, asked.hold_after, asked.explode_after)],
    )
    pulled = cloud.pull()
    say("pulled", pulled)
    say("last", get_last_checkpoint(str(work)) if work.is_dir() else None)
    trainer.train(resume_from_checkpoint=pulled)
    say("local", sorted(path.name for path in work.glob("checkpoint-*")))
    say("weights", digest(model))


if __name__ == "__main__":
    main()
