"""One rank of a job that tests talk to: reads what to do from its standard input, and answers on a pipe of its own.

Started by ``ranks.Ranks``. It keeps its process group from scenario to scenario: importing torch takes seconds.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import traceback
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelname, record.getMessage()))


def main() -> None:
    """Serve until the input ends."""
    warnings.simplefilter("error")
    # Of torch's own making, at the import of its distributed tensors.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    log = _Lines()
    logger = logging.getLogger("cloudckpt")
    logger.setLevel(logging.INFO)
    logger.addHandler(log)
    with os.fdopen(int(os.environ["ANSWERS"]), "w", buffering=1) as answers:
        print(json.dumps({"ready": dist.get_rank()}), file=answers)
        for line in sys.stdin:
            log.lines.clear()
            print(json.dumps({**_answer(json.loads(line)), "log": log.lines}), file=answers)


def _answer(asked: dict[str, Any]) -> dict[str, Any]:
    try:
        function = getattr(importlib.import_module(asked["module"]), asked["function"])
        return {"value": function(**asked["words"])}
    except BaseException as exc:
        error = {
            "kind": type(exc).__name__,
            "message": str(exc),
            "cause": repr(exc.__cause__) if exc.__cause__ is not None else None,
            "traceback": traceback.format_exc(),
        }
        return {"error": error}


if __name__ == "__main__":
    main()
