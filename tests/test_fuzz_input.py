"""The first thousand probes of input made to harm: none may end otherwise than by an answer or a refusal."""

import pytest
import torch
from benchmarks.probe_input import KINDS, probe


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_a_hundred_probes(tmp_path, part):
    torch.set_num_threads(1)
    for number in range(100 * part, 100 * part + 100):
        root = tmp_path / str(number)
        root.mkdir()
        end = probe(number, root)
        assert end in ("ok", "refused"), f"probe {number}, {list(KINDS)[number % len(KINDS)]}: {end}"
