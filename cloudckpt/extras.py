"""Libraries that only some people need: had when they are used, or an error that says what to install."""

from __future__ import annotations

import importlib
from typing import Any

from cloudckpt.errors import ConfigError

__all__ = ["extra"]


def extra(module: str, name: str, purpose: str) -> Any:
    """A module of the extra ``name``.

    Args:
        purpose: who needs it, as the beginning of a sentence.

    Raises:
        ConfigError: it is not installed; says what to write.
    """
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        library = module.partition(".")[0]
        raise ConfigError(
            f'{purpose} needs {library}, which cannot be imported ({exc}): pip install "cloudckpt[{name}]"'
        ) from exc
