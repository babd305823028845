"""The bench of whole encoders: what it times together, alone or not at all."""

import pytest
import torch

from cgspn.bench import encoder
from cgspn.layers import Fp8Mlp

CPU = torch.device("cpu")


def test_a_name_says_whether_mlps_are_in_8_bits():
    plain, fast = (encoder.make(f"cgspn_mini_patch4_28{end}", 28, CPU) for end in ("", "+fp8"))
    assert not any(isinstance(m, Fp8Mlp) for m in plain.modules())
    assert sum(isinstance(m, Fp8Mlp) for m in fast.modules()) == fast.config.depth
    with pytest.raises(ValueError, match="ends in 'int8'"):
        encoder.make("cgspn_mini_patch4_28+int8", 28, CPU)


def test_what_is_for_inference_is_no_row_of_training():
    names = ("cgspn_mini_patch4_28", "cgspn_mini_patch4_28+fp8")
    rows = [encoder.fitted(name, 28, 2, "training", CPU) for name in names]
    trained, fast = encoder.with_ratios(encoder.timed(rows, CPU, 1), "images / s")
    assert trained["images / s"] == pytest.approx(2e3 / trained["ms"])
    assert fast["note"] == "8 bits are for inference"
    assert "ms" not in fast


def test_steps_that_share_too_little_memory_are_timed_alone(monkeypatch):
    called = []

    def medians(steps, **_):
        called.append(tuple(steps))
        return dict.fromkeys(steps, 1.0)

    monkeypatch.setattr(encoder, "medians", medians)
    monkeypatch.setattr(encoder, "model_step", lambda *_: lambda: None)
    monkeypatch.setattr(encoder, "free", lambda _: None)
    monkeypatch.setattr(encoder, "free_memory", lambda _: 10.0)
    rows = [{"px": 28, "mode": "inference", "model": m, "B": 1, "peak GB": 3.0} for m in "abc"]
    alone = encoder.timed(rows, torch.device("cuda"), 1)
    assert called == [("a",), ("b",), ("c",)]
    assert {row["note"] for row in alone} == {"timed alone"}
    called.clear()
    assert all("note" not in row for row in encoder.timed(rows[:2], torch.device("cuda"), 1))
    assert called == [("a", "b")]
