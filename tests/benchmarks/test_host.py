"""The host's part of a block, without a GPU: that launches are kept, and that it cannot creep back unseen."""

import pytest
from benchmarks.host import HostConfig, host_row, main

from cgspn.bench.contenders import OURS


def test_a_block_is_seven_launches_and_its_products(tmp_path):
    """The bound is some ten times what a fast machine takes: it is there for what a dispatcher or compiler costs."""
    pytest.importorskip("triton", reason="launches of Triton's kernels are counted; `make kernels` runs this with it")
    (row,) = main(HostConfig(tmp_path, contenders=(OURS,), calls=5, rounds=5))
    assert (row["launches"], row["products"]) == (7, 3)
    assert row["host us"] < 1500
    assert (tmp_path / "host.json").exists()


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="rounds is 0"):
        HostConfig(rounds=0)
    with pytest.raises(ValueError, match="'Mamba' is not a contender"):
        host_row("Mamba", HostConfig())
