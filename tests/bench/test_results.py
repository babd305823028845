"""Tables, and the program's answer where there is no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cgspn.bench.operator import OperatorConfig, run
from cgspn.bench.results import table, write


def test_table_and_files(tmp_path: Path) -> None:
    rows = [{"B": 1, "ms": 0.12345}, {"B": 2, "note": None}]
    assert table(rows).splitlines() == ["| B | ms | note |", "| --- | --- | --- |", "| 1 | 0.123 |  |", "| 2 |  |  |"]
    write(tmp_path / "new", "speed", {"gpu": "none"}, {"sizes": rows})
    assert json.loads((tmp_path / "new" / "speed.json").read_text()) == {"machine": {"gpu": "none"}, "sizes": rows}
    assert "## sizes" in (tmp_path / "new" / "speed.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="needs a CUDA GPU"):
        run(OperatorConfig(), tmp_path, torch.device("cpu"))
