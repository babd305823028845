"""What torch.compile, export, autograd's checker and the FLOP counter see of the custom ops; on the CPU."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from operator_cases import draw, line_scan_inputs, propagate_inputs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from cgspn.ops import line_scan, propagate_2d, propagate_2d_projected

FOUR = [0, 1, 2, 3]


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked: bool) -> None:
    tensors = [t.float().requires_grad_() for t in propagate_inputs((2, 3, 4, 2), 4)]
    mask = draw(2, 3, 4, seed=3) > -0.8 if masked else None
    for op in (torch.ops.cgspn.propagate_2d, torch.ops.cgspn.propagate_2d_saving):
        torch.library.opcheck(op.default, (*tensors, None, mask, FOUR, not masked, "torch"))
    taken = [t.float().requires_grad_() for t in line_scan_inputs((2, 3, 4, 2))]
    torch.library.opcheck(torch.ops.cgspn.line_scan.default, (*taken, 1, 2, "torch"))


def test_compiles_whole_without_recompiling_for_every_size() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function = torch.compile(lambda *t: propagate_2d(*t), fullgraph=True, dynamic=True, backend=counter)
    for h, w in ((6, 7), (9, 10), (11, 13)):
        tensors = [t.float().requires_grad_() for t in propagate_inputs((2, h, w, 5), 4)]
        found = [torch.autograd.grad(run(*tensors).square().sum(), tensors) for run in (function, propagate_2d)]
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert counter.frame_count == 1


class Layer(torch.nn.Module):
    def forward(self, x: Tensor, logits: Tensor, lam: Tensor, u: Tensor) -> Tensor:
        return (
            propagate_2d(x, logits, lam, u, merge="none") + line_scan(x, logits[:, :, :, 0], x, "up", 2)[..., None, :]
        )


def test_exports_with_a_batch_and_a_grid_of_any_size() -> None:
    small, large = ([t.float() for t in propagate_inputs(shape, 4)] for shape in ((2, 3, 4, 2), (3, 6, 5, 2)))
    free = {0: torch.export.Dim("b"), 1: torch.export.Dim("h"), 2: torch.export.Dim("w")}
    program = torch.export.export(Layer(), tuple(small), dynamic_shapes=[free] * 4)
    assert "cgspn.propagate_2d" in program.graph_module.code
    torch.testing.assert_close(program.module()(*large), Layer()(*large))


def test_flops_are_counted_a_multiply_add_as_two() -> None:
    """Per position, channel and direction: 8 to normalise, 8 for the recurrence, 2 to gate and merge."""
    tensors = [t.float().requires_grad_() for t in propagate_inputs((2, 3, 4, 5), 4)]
    elements = 2 * 3 * 4 * 4 * 5
    with FlopCounterMode(display=False) as forward:
        y = propagate_2d(*tensors)
    assert forward.get_total_flops() == 18 * elements
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == 50 * elements


def test_flops_of_the_projected_operator_do_not_depend_on_where_parameters_are() -> None:
    found = []
    with FakeTensorMode():
        x, weight, bias = torch.empty(2, 3, 4, 8), torch.empty(160, 8), torch.empty(160)
        for parameters in ("auto", "memory", "chip"):
            with FlopCounterMode(display=False) as counter:
                propagate_2d_projected(x, weight, bias, parameters=parameters)
            found.append(counter.get_total_flops())
    assert found == [2 * 24 * 160 * 8 + 18 * 24 * 32] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parameters": "disk"}, "accepted: 'auto', 'memory', 'chip'"),
        ({"parameters": "chip"}, "parameters='chip' cannot run here: x is on 'cpu'"),
        ({"parameters": "chip", "backend": "torch"}, "accepts 'auto', 'cuda'"),
        ({"parameters": "chip", "recompute": False}, "accepts only True"),
    ],
    ids=str,
)
def test_parameters_on_the_chip_say_why_not(options: dict, message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        propagate_2d_projected(torch.zeros(1, 2, 2, 8), torch.zeros(160, 8), None, **options)
