"""The demo's threads on a busy machine."""

import pytest
import torch

from cgspn import demo


@pytest.mark.parametrize(("cores", "load", "expected"), [(2, 0.1, 2), (2, 5.0, 1), (16, 0.0, 8), (16, 12.0, 4)])
def test_threads_are_as_many_as_cores_are_idle(monkeypatch, cores, load, expected):
    monkeypatch.setattr(demo.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(demo.os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(demo.os, "getloadavg", lambda: (load, load, load), raising=False)
    assert demo.idle_threads() == expected


def test_threads_are_given_back(monkeypatch):
    monkeypatch.setattr(demo, "idle_threads", lambda: 1)
    before = torch.get_num_threads()
    with demo.bounded_threads():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
