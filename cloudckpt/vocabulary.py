"""The words other tools use for the same thing: one table for error messages and for the guide "Coming from"."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

__all__ = ["TRANSLATIONS", "Translation", "unknown_keyword"]


@dataclass(frozen=True, slots=True)
class Translation:
    """A keyword as another tool spells it, whose it is, and what to write here."""

    word: str
    tool: str
    here: str


TRANSLATIONS: tuple[Translation, ...] = (
    Translation("save_total_limit", "Hugging Face", "keep_last=N (recent) and keep_best=K (best, counted on top)"),
    Translation("output_dir", "Hugging Face", "root, the first argument"),
    Translation("metric_for_best_model", "Hugging Face", 'monitor="val_loss"'),
    Translation("greater_is_better", "Hugging Face", 'mode="max" or mode="min"'),
    Translation("load_best_model_at_end", "Hugging Face", 'restore(state, select="best") after training'),
    Translation("resume_from_checkpoint", "Hugging Face", "restore(state), which needs no flag on the first start"),
    Translation("save_only_model", "Hugging Face", 'save(step, {"model": model})'),
    Translation("save_steps", "Hugging Face", "an if in the training loop: when to save is its business"),
    Translation("preserve_best_model", "forgather", "monitor= with mode="),
    Translation("best_model_metric", "forgather", 'monitor="loss"'),
    Translation("best_model_greater_is_better", "forgather", 'mode="max" or mode="min"'),
    Translation("preserve_n_best", "forgather", "keep_best=N"),
    Translation("dirpath", "Lightning", "root, the first argument"),
    Translation("save_top_k", "Lightning", "keep_best=K; -1 is keep_best=None"),
    Translation("save_last", "Lightning", "keep_last=1; the newest is always kept"),
    Translation("every_n_train_steps", "Lightning", "an if in the training loop; keep_every=N is which of them stay"),
    Translation("save_weights_only", "Lightning", 'save(step, {"model": model})'),
    Translation("save_folder", "Composer", "root, the first argument"),
    Translation("num_checkpoints_to_keep", "Composer", "keep_last=N; -1 is keep_last=None"),
    Translation("autoresume", "Composer", "restore(state), always"),
    Translation("save_interval", "Composer", "an if in the training loop"),
    Translation("project_dir", "Accelerate", "root, the first argument"),
    Translation("total_limit", "Accelerate", "keep_last=N"),
    Translation("dirname", "Ignite", "root, the first argument"),
    Translation("n_saved", "Ignite", "keep_best=N or keep_last=N"),
    Translation("score_name", "Ignite", "monitor= with mode="),
    Translation("storage_path", "Ray Train", "root, the first argument"),
    Translation("num_to_keep", "Ray Train", "keep_last=N or keep_best=N"),
    Translation("checkpoint_score_attribute", "Ray Train", "monitor="),
    Translation("checkpoint_score_order", "Ray Train", 'mode="min" or mode="max"'),
    Translation("filepath", "Keras", "root, the first argument"),
    Translation("save_best_only", "Keras", "monitor=, mode=, keep_best=1, keep_last=1"),
    Translation("max_to_keep", "Orbax", "keep_last=N"),
    Translation("best_mode", "Orbax", 'mode="min" or mode="max"'),
    Translation("best_fn", "Orbax", "monitor=, the name of a metric given to save()"),
    Translation("save_interval_steps", "Orbax", "an if in the training loop"),
    Translation("directory", "Orbax", "root, the first argument"),
    Translation("folder", "torchtitan", "root, the first argument"),
    Translation("keep_latest_k", "torchtitan", "keep_last=K"),
    Translation("interval", "torchtitan", "an if in the training loop"),
    Translation("map_location", "torch.load", 'load(..., device="cpu")'),
    Translation("weights_only", "torch.load", "nothing: no pickle is loaded unless allow_pickle=True"),
)

_BY_WORD = {translation.word: translation for translation in TRANSLATIONS}


def unknown_keyword(function: str, word: str, known: list[str]) -> TypeError:
    """The error for a keyword that ``function`` does not have, with its translation where there is one."""
    if found := _BY_WORD.get(word):
        return TypeError(f"{function}() has no {word}: that is the {found.tool} name. Here: {found.here}")
    near = difflib.get_close_matches(word, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; it has {', '.join(known)}"
    return TypeError(f"{function}() has no {word}{hint}")
