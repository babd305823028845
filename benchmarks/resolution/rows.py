"""What the studies write: the machine, the settings and the rows so far."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cgspn.environment import describe
from cgspn.models.checkpoint import write_atomically

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def write_rows(path: Path, program: str, config: DataclassInstance, rows: Sequence[dict[str, Any]]) -> None:
    """Write all rows so far, in place of those before. program: a module, as `python -m` takes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(asdict(config), default=str))
    content = {"machine": describe(program=f"python -m {program}"), "settings": settings, "rows": rows}
    write_atomically(path, json.dumps(content, indent=1))
