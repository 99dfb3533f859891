"""The one door from the command line to what needs torch. Nothing else here may import it; import-linter looks."""

from __future__ import annotations

from typing import Any

from cloudckpt.diffing import CheckpointDiff
from cloudckpt.errors import ConfigError
from cloudckpt.exportable import ExportPlan
from cloudckpt.foreign import Imported, ImportPlan
from cloudckpt.progress import Meter
from cloudckpt.storage import ManifestStore

__all__ = ["bring_in", "compare", "export"]

# Imported when they are called: the command line starts without torch, and runs where there is none.
# ruff: noqa: PLC0415


def _needs_torch(exc: ImportError) -> ConfigError:
    return ConfigError(f"this command needs torch, which cannot be imported: {exc}")


def compare(before: ManifestStore, after: ManifestStore, diff: CheckpointDiff) -> tuple[Any, ...]:
    """See ``comparing.compare_values``."""
    try:
        from cloudckpt.comparing import compare_values
    except ImportError as exc:
        raise _needs_torch(exc) from exc
    return compare_values(before, after, diff)


def export(store: ManifestStore, plan: ExportPlan, *, allow_pickle: bool, meter: Meter) -> Any:
    """See ``exporting.export_planned``."""
    try:
        from cloudckpt.exporting import export_planned
    except ImportError as exc:
        raise _needs_torch(exc) from exc
    return export_planned(store, plan, allow_pickle=allow_pickle, meter=meter)


def bring_in(plan: ImportPlan, root: str, **words: Any) -> Imported:
    """See ``importing.import_planned``."""
    try:
        from cloudckpt.importing import import_planned
    except ImportError as exc:
        raise _needs_torch(exc) from exc
    return import_planned(plan, root, **words)
