"""The closing summary of the best checkpoints."""

from __future__ import annotations

from cloudckpt.core.summary import summary_lines
from cloudckpt.testing.builders import checkpoint


def test_the_best_are_listed_with_their_values() -> None:
    """A line for each, in the order given; without a metric, or without any, one line says that there are none."""
    first, second = checkpoint(1), checkpoint(2)
    assert summary_lines("loss", [0.25, 1], [second, first]) == [
        "Best checkpoints (N=2):",
        f"  {second.url}: loss=0.2500",
        f"  {first.url}: loss=1.0000",
    ]
    assert summary_lines("loss", [], []) == ["No best checkpoints tracked"]
    assert summary_lines(None, [0.25], [first]) == ["No best checkpoints tracked"]
