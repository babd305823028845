"""The walk from GSPN to C-GSPN."""

import pytest
import torch
from benchmarks.ablation import AblationConfig, SeparateNormalisation, run

from cgspn.bench.contenders import Shape
from cgspn.layers import Grid, PropagationConfig, PropagationMixer

TINY = Shape(width=24, heads=2, hidden=32, compression=4)


def test_normalising_apart_gives_what_the_scan_gives():
    torch.manual_seed(0)
    config = PropagationConfig(compression=3, merge="sum")
    plain, apart = PropagationMixer(24, config), SeparateNormalisation(24, config)
    apart.load_state_dict(plain.state_dict())
    tokens = torch.randn(2, 20, 24)
    assert torch.allclose(apart(tokens, Grid(4, 5)), plain(tokens, Grid(4, 5)), atol=1e-6)
    assert torch.allclose(apart(tokens, Grid(20, 1)), plain(tokens, Grid(20, 1)), atol=1e-6)


@pytest.mark.slow
def test_the_walk_and_the_sweeps_run_whole(tmp_path):
    walk = AblationConfig(pixels=28, batch=1, batches=(1,), widths=(24, 48), shape=TINY, rounds=1)
    found = run(walk, tmp_path, torch.device("cpu"), say=lambda _: None)
    assert found["GSPN to C-GSPN"][0]["from the first"] == 1
    assert len(found["sweep over width"]) == 2
    assert (tmp_path / "ablation.png").stat().st_size > 1000
