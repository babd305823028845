"""Distillation steps measured: the largest batch, and rows that hold what they say."""

import json

import pytest
import torch

from cgspn.bench.train import TrainBenchConfig, largest_fitting, run
from cgspn.distill import ComputeConfig
from cgspn.distill.flops import forward_flops, training_flops
from cgspn.models import model_config


@pytest.mark.parametrize("limit", [0, 1, 5, 12, 63, 64, 100, 512, 1000])
def test_the_largest_batch_is_found_to_an_eighth(limit):
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= limit

    found = largest_fitting(fits, 512)
    assert found <= min(limit, 512)
    assert found >= min(limit, 512) * 8 / 9.01
    assert max(tried) <= 512
    assert len(tried) == len(set(tried)) <= 14


def test_a_tiny_pair_is_measured_and_memory_that_ends_is_put_up_with(tmp_path, monkeypatch):
    import cgspn.bench.train as bench

    real = bench.run_steps

    def small_memory(task, config, size, batch, steps):
        if batch > 2 or size > 60:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(task, config, size, batch, steps)

    monkeypatch.setattr(bench, "run_steps", small_memory)
    config = TrainBenchConfig(
        "vit_mini_patch4_28", "cgspn_mini_patch4_28", (28, 56, 84), "previous", 8, 2, compute=ComputeConfig()
    )
    said = []
    rows = run(config, tmp_path, torch.device("cpu"), commit="abc", say=said.append)
    assert [row["tokens"] for row in rows] == [49, 196, 441]
    assert [row["largest batch"] for row in rows] == [2, 2, 0]
    assert "images/s" not in rows[2]
    assert rows[0]["images/s"] > 0
    assert rows[0]["MFU"] is None
    student = model_config("cgspn_mini_patch4_28")
    wanted = forward_flops(student, (28, 28))
    wanted += training_flops(student, (56, 56), sublayer_adapters=True, block_adapters=True)
    assert rows[1]["TFLOP an image"] == wanted / 1e12
    saved = json.loads((tmp_path / "train.json").read_text())
    assert saved["machine"]["commit"] == "abc"
    assert saved["stage 2, one step"] == rows
    assert len(said) == 3
    assert (tmp_path / "train.png").stat().st_size > 1000
