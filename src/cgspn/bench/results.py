"""Result files of benchmarks: JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table; columns in the order in which they first appear, floats to three digits."""
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def text(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)

    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(text(row.get(c)) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def write(
    folder: Path, name: str, machine: Mapping[str, Any], tables: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    """Write `name`.json and `name`.md with the machine and every table under its title."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"machine": machine, **tables}, indent=1) + "\n")
    parts = [f"# {name}", "\n".join(f"- {key}: {value}" for key, value in machine.items())]
    parts += [f"## {title}\n\n{table(rows)}" for title, rows in tables.items()]
    (folder / f"{name}.md").write_text("\n\n".join(parts) + "\n")
