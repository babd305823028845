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
from pathlib import Path

import pytest
import torch
from torch import nn

from cgspn.layers import Block, Grid, PropagationConfig, PropagationMixer
from cgspn.layers.executor import TRIES, Plan
from cgspn.ops.gpu import Launch, registered

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


@torch.no_grad()
def test_a_pass_with_other_operations_is_not_kept():
    """Without a convolution a norm of PyTorch's runs, which nothing records: its output is not where a launch reads."""
    block = block_of(local_kernel=0)
    for seed in range(TRIES + 2):
        check(block, tokens_of(seed), kept=False)
    assert list(block._state.plans.values()) == [TRIES]


@torch.no_grad()
def test_all_blocks_share_a_workspace_that_grows():
    first, second = warm(block_of()), block_of(value_expansion=2)
    for seed in range(4):
        check(second, tokens_of(seed, 3), kept=None)
        check(first, tokens_of(seed), kept=None)
    plans = [next(iter(block._state.plans.values())) for block in (first, second)]
    assert plans[0].replay.memory is plans[1].replay.memory
