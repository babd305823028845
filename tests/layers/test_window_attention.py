"""Attention in windows equals whole attention behind a mask, in every order of tokens, for any grid and window."""

import pytest
import torch

from cgspn.layers import AttentionConfig, AttentionMixer, Grid, WindowAttentionMixer
from cgspn.layers import window_attention as module
from cgspn.layers.window_attention import order

GRIDS = [(8, 8), (7, 10), (3, 5), (1, 9), (16, 11), (4, 6)]
WINDOWS = [(8, 8), (3, 3), (2, 5), (1, 1), (20, 20), (1, 4)]


def pair(window, width=24, heads=3):
    """A mixer in windows, and whole attention with its weights; float64."""
    torch.manual_seed(0)
    mixer = WindowAttentionMixer(width, AttentionConfig(heads), window).double()
    whole = AttentionMixer(width, AttentionConfig(heads)).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    whole.load_state_dict(mixer.state_dict())
    return mixer, whole


def masked_whole(whole, tokens, grid, window):
    """The definition: softmax over the keys of the same window that are inside the mask."""
    q, k, v = whole._split(tokens)
    row, column = torch.arange(grid.height) // window[0], torch.arange(grid.width) // window[1]
    number = (row[:, None] * grid.width + column).flatten()
    seen = (number[:, None] == number)[None, None]
    if grid.mask is not None:
        seen = seen & grid.mask.flatten(1)[:, None, None]
        seen = seen | torch.eye(grid.tokens, dtype=torch.bool)  # what nobody reads attends to itself
    logits = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
    return whole.out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


def close(a, b):
    assert (a - b).norm() <= 1e-12 * b.norm()


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", GRIDS)
def test_windows_equal_masked_whole_attention_forward_and_backward(shape, window):
    mixer, whole = pair(window)
    grid = Grid(*shape)
    tokens = torch.randn(2, grid.tokens, 24, dtype=torch.float64, requires_grad=True)
    out, expected = mixer(tokens, grid), masked_whole(whole, tokens, grid, window)
    close(out, expected)
    direction = torch.randn_like(out)
    grads = torch.autograd.grad(out, [tokens, *mixer.parameters()], direction)
    truth = torch.autograd.grad(expected, [tokens, *whole.parameters()], direction)
    largest = max(t.norm() for t in truth)
    for one, other in zip(grads, truth, strict=True):
        assert (one - other).norm() < 1e-12 * largest
    row = torch.tensor([0, grid.tokens - 1])
    picture = mixer.weights(tokens, grid, row)
    _, _, v = mixer._split(tokens)
    close(mixer.out((picture @ v).transpose(1, 2).flatten(2)), out[:, row])


@pytest.mark.parametrize("window", [(3, 3), (2, 5), (8, 8)])
def test_masks_leave_out_what_is_padding(window):
    mixer, whole = pair(window)
    mask = torch.zeros(3, 7, 10, dtype=torch.bool)
    mask[0, :5, :4] = mask[1, 2:, 3:9] = True  # the third image is nothing but padding
    grid = Grid(7, 10, mask=mask)
    tokens = torch.randn(3, 70, 24, dtype=torch.float64, requires_grad=True)
    inside = mask.flatten(1)
    out, expected = mixer(tokens, grid)[inside], masked_whole(whole, tokens, grid, window)[inside]
    close(out, expected)
    (grad,) = torch.autograd.grad(out.sum(), tokens)
    close(grad, torch.autograd.grad(expected.sum(), tokens)[0])
    assert mixer(tokens, grid).isfinite().all()
    assert (grad[~inside] == 0).all()


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", GRIDS)
def test_window_order_and_back_is_exact_and_windows_are_contiguous(shape, window):
    grid = Grid(*shape)
    rows = torch.arange(2 * grid.tokens).view(2, -1, 1)
    ordered, inside = order(rows, grid, window)
    assert inside.window == window
    assert torch.equal(order(ordered, inside, None)[0], rows)
    assert torch.equal(order(ordered, inside, (2, 3))[0], order(rows, grid, (2, 3))[0])
    image, place = ordered.flatten() // grid.tokens, ordered.flatten() % grid.tokens
    number = (image * 1000 + place // grid.width // window[0]) * 1000 + place % grid.width // window[1]
    assert len(number.unique_consecutive()) == len(number.unique())


def test_tokens_stay_in_window_order_between_layers():
    mixer, whole = pair((3, 4))
    grid = Grid(7, 9)
    tokens = torch.randn(2, 63, 24, dtype=torch.float64)
    ordered, inside = order(tokens, grid, mixer.window)
    twice = mixer(mixer(ordered, inside), inside)
    expected = masked_whole(whole, masked_whole(whole, tokens, grid, (3, 4)), grid, (3, 4))
    close(order(twice, inside, None)[0], expected)


def test_many_windows_go_in_several_calls(monkeypatch):
    mixer, whole = pair((2, 2))
    monkeypatch.setattr(module, "MOST", 3)
    tokens = torch.randn(2, 35, 24, dtype=torch.float64)
    close(mixer(tokens, Grid(5, 7)), masked_whole(whole, tokens, Grid(5, 7), (2, 2)))


@pytest.mark.parametrize("masked", [False, True])
def test_one_exported_program_takes_grids_of_any_size(masked):
    mixer, _ = pair((3, 4))

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = mixer

        def forward(self, maps, mask):
            grid = Grid(maps.shape[1], maps.shape[2], mask=mask if masked else None)
            return self.mixer(maps.flatten(1, 2), grid)

    sides = {1: torch.export.Dim("h", min=1, max=64), 2: torch.export.Dim("w", min=1, max=64)}
    example = torch.randn(2, 5, 6, 24, dtype=torch.float64), torch.rand(2, 5, 6) > 0.3
    with torch.no_grad(), torch.fx.experimental._config.patch(backed_size_oblivious=True):
        program = torch.export.export(Whole(), example, dynamic_shapes=(sides, sides), strict=False).module()
    for shape in [(5, 6), (6, 8), (1, 2), (7, 13)]:
        maps, mask = torch.randn(2, *shape, 24, dtype=torch.float64), torch.rand(2, *shape) > 0.3
        plain = mixer(maps.flatten(1, 2), Grid(*shape, mask=mask if masked else None))
        inside = mask.flatten(1) if masked else slice(None)
        close(program(maps, mask)[inside], plain[inside])


def test_tokens_before_the_grid_are_refused():
    mixer, _ = pair((2, 2))
    with pytest.raises(ValueError, match="window attention got 1 tokens before the grid"):
        mixer(torch.randn(1, 10, 24, dtype=torch.float64), Grid(3, 3, prefix=1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("shape", "window"), [((74, 74), (8, 8)), ((37, 50), (18, 18)), ((5, 9), (1, 1))])
def test_windows_on_a_gpu_equal_float64(shape, window, masked, dtype):
    """SO400M's heads of 72 channels; each value within the rounding of its dtype, and the same when run again."""
    torch.manual_seed(0)
    mixer = WindowAttentionMixer(288, AttentionConfig(heads=4), window).cuda()
    mask = torch.rand(2, *shape) > 0.3 if masked else None
    tokens = torch.randn(2, shape[0] * shape[1], 288)
    exact = WindowAttentionMixer(288, AttentionConfig(heads=4), window).double()
    exact.load_state_dict({name: value.to(dtype).double().cpu() for name, value in mixer.state_dict().items()})
    exact_in = tokens.to(dtype).double().requires_grad_()
    leaf = tokens.to("cuda", dtype).requires_grad_()
    inside = mask.flatten(1) if masked else slice(None)
    expected = exact(exact_in, Grid(*shape, mask=mask))[inside]
    mixer = mixer.to(dtype)
    outs = [mixer(leaf, Grid(*shape, mask=None if mask is None else mask.cuda()))[inside] for _ in range(2)]
    assert torch.equal(*outs)
    (grad,) = torch.autograd.grad(outs[0].float().square().sum(), leaf)
    (truth,) = torch.autograd.grad(expected.square().sum(), exact_in)
    limit = 2e-2 if dtype == torch.bfloat16 else 2e-3  # products of float32 may round to TF32's 10 bits
    assert (outs[0].double().cpu() - expected).norm() < limit * expected.norm()
    assert (grad.double().cpu() - truth).norm() < limit * truth.norm()


@pytest.mark.gpu
def test_more_windows_than_a_kernel_counts():
    torch.manual_seed(0)
    mixer = WindowAttentionMixer(64, AttentionConfig(heads=2), (1, 1)).to("cuda", torch.bfloat16)
    tokens = torch.randn(2, 300 * 300, 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        out, alone = mixer(tokens, Grid(300, 300)), mixer(tokens[:, :64], Grid(8, 8))
    torch.testing.assert_close(out[:, :64], alone, atol=1e-2, rtol=1e-2)


def test_one_graph_without_a_break():
    mixer, _ = pair((3, 4))
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    tokens = torch.randn(2, 35, 24, dtype=torch.float64, requires_grad=True)
    close(compiled(tokens, Grid(5, 7)), mixer(tokens, Grid(5, 7)))
    grads = [torch.autograd.grad(f(tokens, Grid(5, 7)).square().sum(), tokens)[0] for f in (compiled, mixer)]
    close(*grads)
