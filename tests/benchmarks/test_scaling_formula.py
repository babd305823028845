"""What the scaling formula makes of measured steps and links."""

import json
from pathlib import Path

import pytest
import torch
from benchmarks.scaling_formula import SimulationConfig, communication, run, simulate

MEASURED = Path(__file__).parents[2] / "results/scaling/scaling.json"


def saved_of(step=400.0, spread=0.0, size=2.4e9):
    one = {"mode": "stage 2", "image": 378, "batch": 64, "gpus": 1, "step_ms": step, "spread_ms": spread}
    one |= {"bytes": size, "blocks": 27, "student": 0.75, "captured": False}
    compute = {"blocks_per_unit": 3, "reshard_after_forward": False}
    return {
        "settings": {"compute": compute},
        "rows": [one],
        "links": [{"gpus": 2, "all_reduce": 300e9, "all_gather": 250e9}],
    }


def test_a_simulation_of_what_hides_is_perfect_and_of_what_does_not_is_not():
    hidden = simulate(saved_of(), SimulationConfig(hop=0))
    assert all(row["efficiency"] == 1 for row in hidden)
    assert hidden[0]["images/s"] == pytest.approx(64 * 64 / 0.4)
    shown = simulate(saved_of(), SimulationConfig(hop=0, overlap=0))
    sent = 2 * 63 / 64 * 2.4e9 / 300e9  # eight cards of 50 GB/s are faster than the links within
    assert shown[0]["not hidden (ms)"] == pytest.approx(1e3 * sent)
    assert shown[0]["ms a step"] == pytest.approx(400 + 1e3 * sent)


def test_a_simulation_knows_that_captured_steps_of_ddp_send_afterwards():
    saved = saved_of()
    saved["rows"].append(saved["rows"][0] | {"captured": True, "step_ms": 390.0})
    rows = simulate(saved, SimulationConfig(gpus=(64,), hop=0))
    assert [(row["mode"], row["captured"]) for row in rows] == [
        *(("stage 2 ddp", "no"), ("stage 2 fsdp", "no"), ("stage 2 ddp", "yes"), ("stage 2 fsdp", "yes")),
    ]
    assert [rows[i]["not hidden (ms)"] for i in (0, 1, 3)] == [0, 0, 0]
    assert rows[2]["not hidden (ms)"] == pytest.approx(rows[2]["communication (ms)"])


def test_a_simulation_of_units_that_stay_sends_less_and_less_often():
    one = communication("stage 2 fsdp", 8, 1e9, 27, 300e9, SimulationConfig())
    few = communication("stage 2 fsdp", 8, 1e9, 9, 300e9, SimulationConfig(), passes=2)
    assert few < 2 / 3 * one


def test_a_simulation_waits_for_the_slowest_and_for_slow_links():
    late = simulate(saved_of(spread=4), SimulationConfig(gpus=(64,)))
    assert late[0]["waiting for the slowest (ms)"] == pytest.approx(4 * (2 * torch.tensor(64.0).log()).sqrt().item())
    fast = communication("stage 2 ddp", 16, 1e9, 27, 300e9, SimulationConfig(hop=0))
    slow = communication("stage 2 ddp", 16, 1e9, 27, 300e9, SimulationConfig(hop=0, between=10))
    assert slow / fast == pytest.approx(300 / 80)
    more = [communication("stage 2 fsdp", n, 1e9, 27, 300e9, SimulationConfig()) for n in (2, 8, 64, 512)]
    assert more == sorted(more)


@pytest.mark.parametrize("wrong", [{"node": 0}, {"between": 0.0}, {"gpus": (0,)}])
def test_clusters_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="accepted"):
        SimulationConfig(**wrong)


def test_it_reads_what_the_bench_wrote(tmp_path):
    with pytest.raises(ValueError, match=r"has no scaling\.json"):
        run(SimulationConfig(), tmp_path)
    saved = json.loads(MEASURED.read_text())
    (tmp_path / "scaling.json").write_text(json.dumps(saved | {"links": []}))
    with pytest.raises(ValueError, match="links of several"):
        run(SimulationConfig(), tmp_path)
    (tmp_path / "scaling.json").write_text(json.dumps(saved))
    rows = run(SimulationConfig(), tmp_path, say=lambda _: None)
    assert {row["GPUs"] for row in rows} == {2, 64, 512}
    assert "no measurement" in (tmp_path / "simulation.md").read_text()
