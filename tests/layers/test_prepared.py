"""Launches that are kept for a block in inference give what its layers give, whatever changes in between.

On a GPU; or on the CPU with TRITON_INTERPRET=1, where a stand-in for a GPU runs kept launches from their addresses
alone: Triton's kernels in its interpreter, the scans compiled for the host (tests/ops/emulation).
"""

import copy
import ctypes
import os
import pickle
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cgspn.layers import Block, Grid, PropagationConfig, PropagationMixer, executor
from cgspn.layers.executor import TRIES, Plan
from cgspn.layers.propagation import value_config
from cgspn.layers.training import Trained
from cgspn.ops.gpu import Launch, registered
from cgspn.ops.products import Pointer

sys.path.append(str(Path(__file__).parents[1] / "ops" / "emulation"))
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = [
    pytest.mark.skipif(
        not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or TRITON_INTERPRET=1"
    ),
    *([pytest.mark.gpu] if GPU else []),
]
GRID = Grid(4, 5)
OTHERS = [
    {"merge": "sum"},
    {"value_expansion": 2, "channels_per_group": 4, "forget_gate": True},
    {"value_expansion": 2, "channels_per_group": 8, "forget_gate": True, "normalise_state": True},
    {"directions": ("up",)},
    {"local_kernel": 5, "merge_norm": False},
]


@pytest.fixture(autouse=True)
def gpu():
    pytest.importorskip("triton")
    if GPU:
        yield
        return
    from emulate import EmulatedGpu

    class InterpretedGpu(EmulatedGpu):
        runs_triton = True

        def through_triton(self, launch, tensors, wanted):
            launch.through_triton(tensors)
            kept = Launch(self, 0, launch.grid, 32, 0, [bytes(8)] * len(tensors), [(n, 0) for n in range(len(tensors))])
            kept.function = launch, [None if t is None else (t.shape, t.dtype) for t in tensors]
            return kept if wanted else None

        def product(self, stream, scratch, a, b, out, bias=None, add=None, gelu=False):
            tensors = [a, b, out, out if add is None else add]
            pointers = [Pointer(t.data_ptr()) for t in tensors]
            if add is None or add is out:
                pointers[3] = pointers[2]

            def run():
                x, y, z, more = (strided(p.value, t) for p, t in zip(pointers, tensors, strict=True))
                found = x.float() @ y.float() + (0 if bias is None else bias) + (0 if add is None else more)
                z.copy_(torch.nn.functional.gelu(found, approximate="tanh") if gelu else found)

            return SimpleNamespace(pointers=pointers, run=run)

        def submit(self, launch):
            if not isinstance(launch.function, tuple):
                super().submit(launch)
                return
            wanted, looks = launch.function
            addresses = [launch.words[slot] for slot in launch.slots]
            wanted.through_triton([at(a, look) for a, look in zip(addresses, looks, strict=True)])

    with registered(torch.device("cpu"), InterpretedGpu()):
        yield


def at(address, look):
    """The tensor at an address."""
    if look is None:
        return None
    shape, dtype = look
    memory = (ctypes.c_byte * (shape.numel() * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def strided(address, like):
    """The matrix at an address that lies in memory as another."""
    turned = like if like.stride(1) == 1 else like.t()
    memory = at(address, (torch.Size([(turned.shape[0] - 1) * turned.stride(0) + turned.shape[1]]), like.dtype))
    return memory.as_strided(like.shape, like.stride())


def block_of(scale=None, **options):
    torch.manual_seed(0)
    mixer = PropagationMixer(48, PropagationConfig(3, **options))
    block = Block(48, mixer, 96, "gelu_tanh", 1e-6, scale)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    return block.to(DEVICE, torch.float16).eval()


def tokens_of(seed=1, batch=2, grid=GRID):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, grid.tokens, 48, generator=generator).to(DEVICE, torch.float16)


def check(block, tokens, grid=GRID, *, kept=True):
    """The block against its layers; and whether it ran by launches that were kept."""
    block.fusion_backend = "torch"
    plain = block(tokens, grid)
    del block.fusion_backend
    before = tokens.clone()
    out = block(tokens, grid)
    assert float((out.float() - plain.float()).norm() / plain.float().norm()) < 5e-3
    assert torch.equal(tokens, before)
    if kept is not None:
        assert bool(block._state is not None and any(isinstance(p, Plan) for p in block._state.plans.values())) == kept


def warm(block):
    """Run until launches are kept: the first call compiles and tells how much memory it takes, the next is recorded."""
    for seed in range(4):
        check(block, tokens_of(seed), kept=None if seed < 3 else True)
    return block


@torch.no_grad()
def test_every_call_gives_what_the_layers_give():
    block = warm(block_of())
    small = Grid(3, 2)
    for seed in range(3):
        check(block, tokens_of(seed, 1, small), small)
    check(block, tokens_of(9))
    mask = torch.ones(2, 4, 5, dtype=torch.bool, device=DEVICE)
    mask[0, 2:] = False
    for seed in range(3):
        check(block, tokens_of(seed), GRID._replace(mask=mask))
    assert len(block._state.plans) == 3
    check(block, tokens_of(1).transpose(0, 1).contiguous().transpose(0, 1))  # of other strides


@torch.no_grad()
def test_what_changes_between_calls_counts():
    block = warm(block_of())
    for parameter in block.parameters():
        parameter.add_(0.05)
    check(block, tokens_of(3), kept=None)
    for parameter in block.parameters():
        parameter.data = parameter.data * 1.1
    check(block, tokens_of(4), kept=None)
    block.norm1.eps = 0.1
    check(block, tokens_of(5), kept=None)
    block.load_state_dict(block_of().state_dict())
    check(block, tokens_of(6), kept=None)
    seen = []
    handle = block.mixer.norm.register_forward_hook(lambda *_: seen.append(1))
    block(tokens_of(7), GRID)
    assert seen == [1]
    handle.remove()
    block.mixer.up = nn.Linear(64, 48, device=DEVICE, dtype=torch.float16)
    check(block, tokens_of(8), kept=None)
    block.float()
    out = block(tokens_of(9).float(), GRID)
    assert out.dtype == torch.float32


@torch.no_grad()
def test_copies_have_launches_of_their_own():
    block = warm(block_of())
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert other._state is None
        other.mixer.up.weight.mul_(2)
        check(other, tokens_of(4), kept=None)
    check(block, tokens_of(4))


@pytest.mark.skipif(not GPU, reason="Triton's interpreter runs in one thread")
@torch.no_grad()
def test_threads_share_a_block():
    block, wrong = warm(block_of()), []
    inputs = [tokens_of(seed) for seed in range(4)]
    wanted = [block(t, GRID) for t in inputs]

    def work(t, want):
        with torch.no_grad():
            wrong.extend(_ for _ in range(200) if not torch.equal(block(t, GRID), want))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
@pytest.mark.parametrize("options", OTHERS)
def test_launches_of_other_settings_are_kept_too(options):
    block = warm(block_of(**options))
    check(block, tokens_of(7))
    block.mixer.up.weight.data.mul_(2)  # in place, past the version that autograd counts
    check(block, tokens_of(8))


@pytest.mark.parametrize("first", [True, False])
def test_inference_mode_and_no_grad_share_launches(first):
    block = block_of(value_expansion=2, channels_per_group=8, forget_gate=True, normalise_state=True)
    with torch.inference_mode(first), torch.no_grad():
        warm(block)
    with torch.inference_mode(not first), torch.no_grad():
        check(block, tokens_of(5))


@torch.no_grad()
def test_a_pass_with_other_operations_is_not_kept():
    """Without a convolution a norm of PyTorch's runs, which nothing records: its output is not where a launch reads."""
    block = block_of(local_kernel=0)
    for seed in range(TRIES + 2):
        check(block, tokens_of(seed), kept=False)
    assert list(block._state.plans.values()) == ["a launch or product uses memory that was not allocated in the pass"]


@torch.no_grad()
@pytest.mark.parametrize("options", [OTHERS[2], {}])
def test_launches_of_wide_sublayers_are_kept_too(options, monkeypatch):
    monkeypatch.setattr(executor, "LATENT_MOST", 8)
    monkeypatch.setattr(Block, "fusion_backend", "triton")
    block = warm(block_of(**options))
    mask = torch.rand(2, 4, 5, device=DEVICE) > 0.3
    for seed in range(4):
        check(block, tokens_of(seed), GRID._replace(mask=mask), kept=None)
    check(block, tokens_of(7))


def test_too_little_memory_leaves_a_block_as_it_is(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(executor, "recorded", full)
    monkeypatch.setattr(executor, "record", full)
    block = block_of()
    with torch.no_grad():
        check(block, tokens_of(1), kept=False)
    check_training(block, 2, kept=False)
    assert list(block._state.plans.values()) == [executor.NO_MEMORY] * 2


@torch.no_grad()
def test_launches_that_give_something_else_are_not_kept(monkeypatch):
    block, plain = block_of(), executor.run_fused
    monkeypatch.setattr(executor, "run_fused", lambda *arguments: plain(*arguments) * 1.1)
    for seed in range(5):
        block(tokens_of(seed), GRID)
    assert list(block._state.plans.values()) == ["the kept launches give a different result"]


@torch.no_grad()
def test_all_blocks_share_a_workspace_that_grows():
    first, second = warm(block_of()), block_of(value_expansion=2)
    for seed in range(4):
        check(second, tokens_of(seed, 3), kept=None)
        check(first, tokens_of(seed), kept=None)
    plans = [next(iter(block._state.plans.values())) for block in (first, second)]
    assert plans[0].replay.memory is plans[1].replay.memory


def gradients(block, tokens, dout, **options):
    """Output and gradients to tokens and parameters."""
    tokens = tokens.detach().requires_grad_()
    out = block(tokens, GRID)
    return [out, *torch.autograd.grad(out, [tokens, *block.parameters()], dout, **options)]


def check_training(block, seed, *, kept, **options):
    tokens, dout = tokens_of(seed), tokens_of(seed + 50)
    block.fusion_backend = "torch"
    plain = gradients(block, tokens, dout)
    del block.fusion_backend
    found = gradients(block, tokens, dout, **options)
    for a, b in zip(plain, found, strict=True):
        assert float((a.detach().float() - b.detach().float()).norm() / a.detach().float().norm()) < 1e-2
    assert any(isinstance(p, Trained) for p in block._state.plans.values()) == kept
    return found


@pytest.mark.parametrize("options", [{}, {"directions": ("down", "right")}])
def test_training_by_kept_passes_gives_the_gradients_of_the_layers(options):
    block = block_of(**options).train()
    for seed in range(3):
        check_training(block, seed, kept=True)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(1.1)
    found = check_training(block, 4, kept=True)
    first = check_training(block, 5, kept=True, create_graph=True)  # by way of the layers
    assert first[1].requires_grad
    assert found[0].grad_fn.name() == "TrainedBlockBackward"
    tokens = tokens_of(4).requires_grad_()
    y = torch.utils.checkpoint.checkpoint(block, tokens, GRID, use_reentrant=False)
    again = torch.autograd.grad(y, [tokens, *block.parameters()], tokens_of(54))
    for a, b in zip(found[1:], again, strict=True):
        assert torch.equal(a, b)
    two = [block(tokens_of(seed).requires_grad_(), GRID) for seed in (6, 7)]  # backward after another forward
    wanted = [torch.autograd.grad(y, list(block.parameters()), tokens_of(9)) for y in two]
    for seed, want in zip((6, 7), wanted, strict=True):
        for a, b in zip(gradients(block, tokens_of(seed), tokens_of(9))[2:], want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("change", ["frozen", "hook", "scale", "values"])
def test_what_training_does_not_keep(change):
    block = block_of(0.5 if change == "scale" else None, **({"value_expansion": 2} if change == "values" else {}))
    seen = []
    if change == "frozen":
        block.mixer.down.bias.requires_grad_(False)
    if change == "hook":
        block.mixer.down.register_full_backward_hook(lambda *_: seen.append(1))
    tokens = tokens_of(1).requires_grad_()
    block(tokens, GRID).sum().backward()
    assert not block._state or not any(isinstance(p, Trained) for p in block._state.plans.values())
    assert block.mixer.up.weight.grad.isfinite().all()
    assert seen == ([1] if change == "hook" else [])


@pytest.mark.skipif(not GPU, reason="as wide as SO400M")
@pytest.mark.parametrize("values", [None, 6])
@pytest.mark.parametrize("side", [27, 74])
def test_blocks_of_full_width(values, side):
    torch.manual_seed(0)
    grid = Grid(side, side)
    mixer = PropagationMixer(1152, replace(value_config(values), compression=18))
    block = Block(1152, mixer, 4304, "gelu_tanh", 1e-6, None).to(DEVICE, torch.bfloat16)
    nn.init.normal_(block.mixer.up.weight, std=0.05)
    block.fusion_backend = "auto" if values is None else "triton"
    inputs = [torch.randn(2, grid.tokens, 1152, device=DEVICE, dtype=torch.bfloat16) for _ in range(4)]
    with torch.no_grad():
        for tokens in inputs:
            out = block(tokens, grid)
        assert any(isinstance(plan, Plan) for plan in block._state.plans.values())
        exact = copy.deepcopy(block).double()(tokens.double(), grid)
        assert float((out.double() - exact).norm() / exact.norm()) < 1e-2
    wide = copy.deepcopy(block).float()
    for tokens, dout in zip(inputs, inputs[::-1], strict=True):
        leaf, full = tokens.detach().requires_grad_(), tokens.float().requires_grad_()
        found = torch.autograd.grad(block(leaf, grid), [leaf, *block.parameters()], dout)
        wanted = torch.autograd.grad(wide(full, grid), [full, *wide.parameters()], dout.float())
        for a, b in zip(found, wanted, strict=True):
            assert float((a.float() - b).norm() / b.norm()) < 4e-2
    assert any(isinstance(plan, Trained) for plan in block._state.plans.values()) == (values is None)
