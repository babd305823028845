"""The efficiency tables: what they conclude from times, and that they run whole at a small size."""

import json

import pytest
import torch

from cgspn.bench import encoder, table
from cgspn.bench.contenders import OURS, Shape, build

TINY = Shape(width=24, heads=2, hidden=32, compression=4)
CPU = torch.device("cpu")


def row(px, mixer, sublayer, block, **rest):
    return {
        "px": px,
        "B": 1,
        "mode": "inference",
        "mixer": mixer,
        "sub-layer ms": sublayer,
        "block ms": block,
        **rest,
    }


def test_ratios_are_to_the_attention_with_the_fastest_block():
    rows = [row(56, "attention, math", 1.0, 8.0), row(56, "attention, flash", 4.0, 6.0), row(56, OURS, 2.0, 3.0)]
    rows.append({"px": 56, "B": 1, "mode": "inference", "mixer": "GSPN", "note": "OOM"})
    math, _, ours, gspn = table.compared(rows)
    assert ours["block: attention / this"] == 2.0
    assert ours["sub-layer: attention / this"] == 2.0
    assert math["sub-layer: attention / this"] == 4.0
    assert ours["sub-layer share"] == pytest.approx(2 / 3)
    assert gspn["note"] == "OOM"
    assert gspn["block: attention / this"] is None


def test_crossover_is_the_size_from_which_it_wins_at_every_larger_one():
    rows = []
    for px, ours in ((56, 2.0), (112, 0.5), (224, 1.5), (448, 0.1), (896, 0.1)):
        rows += table.compared([row(px, "attention, flash", 1.0, 1.0), row(px, OURS, ours, ours)])
    found = next(r for r in table.crossovers(rows) if r["part"] == "block")
    assert found["slower at px"] == "56, 224"
    assert found["faster from px"] == 448


def test_an_unknown_contender_is_refused():
    with pytest.raises(ValueError, match="'Mamba' is not a contender"):
        build("Mamba", TINY, CPU, torch.float32)


@pytest.mark.slow
def test_tables_run_whole(tmp_path):
    config = table.TableConfig(sizes=(28, 42), batches=(1,), shape=TINY, rounds=1)
    rows = table.run(config, tmp_path, CPU, say=lambda _: None)
    assert {r["mode"] for r in rows} == {"inference", "training"}
    assert all(r["block ms"] > 0 for r in rows)
    saved = json.loads((tmp_path / "table.json").read_text())
    assert saved["blocks"] == rows
    assert {"command", "commit", "copy ceiling"} <= saved["machine"].keys()
    assert (tmp_path / "table.png").stat().st_size > 1000

    whole = encoder.EncoderBenchConfig(
        models=("vit_mini_patch4_28", "cgspn_mini_patch4_28"), sizes=(28,), batch=2, largest=((56, 1),), rounds=1
    )
    tables = encoder.run(whole, tmp_path, CPU, say=lambda _: None)
    assert [r["B"] for r in tables["throughput"]] == [2] * 4
    assert (tmp_path / "encoder.png").stat().st_size > 1000
    assert all(r["fits"] for r in tables["very high resolution"])
