"""The command line. It never loads torch, so it starts at once and runs where torch is not installed."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Entry point of ``cloudckpt``."""
    from cloudckpt.cli.app import run  # noqa: PLC0415 - so that importing the package stays quick

    run()
