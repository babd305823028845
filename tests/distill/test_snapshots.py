"""Snapshots on disk."""

import warnings

import torch

from cgspn.distill.snapshots import Snapshots


def test_a_process_that_is_alone_writes_and_reads_without_warnings(tmp_path):
    snapshots, weight = Snapshots(tmp_path, 1), torch.arange(3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        snapshots.save(1, {"weight": weight}, {"loss": 2})
        read = {"weight": torch.zeros(3)}
        assert snapshots.load(1, read) == {"loss": 2}
    assert torch.equal(read["weight"], weight)
