"""Saved on N ranks, restored on M: bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

import cloudckpt
from tests.distributed import scenarios
from tests.distributed.ranks import Ranks


@pytest.mark.parametrize("given", ["train-state", "objects"])
@pytest.mark.parametrize("ranks", [(n, m) for n in (1, 2, 4) for m in (1, 2, 4)], ids="{0[0]}-to-{0[1]}".format)
@pytest.mark.parametrize("kind", ["fsdp", "tp", "ddp"])
def test_any_number_of_ranks_restores_what_any_number_saved(
    four_ranks: Ranks, tmp_path: Path, kind: str, ranks: tuple[int, int], given: str
) -> None:
    """Weights and moments are the same, whole, whatever they were sharded over."""
    root, (before, after), wrapped = str(tmp_path / "run"), ranks, given == "train-state"
    saved = four_ranks.run(scenarios.save_sharded, root=root, kind=kind, ranks=before, wrapped=wrapped)
    assert [outcome.error for outcome in saved] == [None] * 4
    restored = four_ranks.run(scenarios.restore_sharded, root=root, kind=kind, ranks=after, wrapped=wrapped)
    assert [outcome.error for outcome in restored] == [None] * 4
    for outcome in restored[:after]:
        assert outcome.value == saved[0].value
    loaded = cloudckpt.open(root).load()
    assert scenarios.digest({**loaded["model"]}) == saved[0].value["model"]
