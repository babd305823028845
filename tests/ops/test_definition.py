"""The reference against an oracle that shares no code with it: dense N x N affinity matrices, one a channel.

The oracle finds every weight with a scalar formula, builds W[i] as a matrix and stacks the products W[i] ... W[k+1]
into the lower-triangular affinity of the whole grid, in the order of the scan. One multiplication is then the scan.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from operator_cases import draw, every_backend, line_scan_inputs, propagate_inputs, skip_unless_supported
from torch import Tensor

from cgspn.ops import DIRECTIONS, line_scan, line_scan_reference, propagate_2d, propagate_2d_reference

GRIDS = [(3, 4), (4, 3), (4, 4), (1, 5), (5, 1), (1, 1)]
SUBSETS = [names for n in (1, 2, 3, 4) for names in itertools.permutations(DIRECTIONS, n)]


def scan_order(direction: str, height: int, width: int) -> list[list[tuple[int, int]]]:
    """Grid positions of every line of a scan: [line][position on the line] -> (row, column)."""
    return {
        "down": [[(i, j) for j in range(width)] for i in range(height)],
        "up": [[(height - 1 - i, j) for j in range(width)] for i in range(height)],
        "right": [[(j, i) for j in range(height)] for i in range(width)],
        "left": [[(j, width - 1 - i) for j in range(height)] for i in range(width)],
    }[direction]


def affinity(steps: list[np.ndarray]) -> np.ndarray:
    """Block [i, k] is W[i] W[i-1] ... W[k+1]: what line i takes from what enters at line k."""
    lines, m = len(steps), steps[0].shape[0]
    dense = np.zeros((lines, m, lines, m))
    for i in range(lines):
        dense[i, :, i] = np.eye(m)
        for k in range(i):
            dense[i, :, k] = steps[i] @ dense[i - 1, :, k]
    return dense.reshape(lines * m, lines * m)


def normalised_step(logits: np.ndarray, here: list, before: list, inside: np.ndarray) -> np.ndarray:
    """W[i] as a dense matrix, one row at a time; rows and columns outside the mask are zero."""
    m = len(here)
    step = np.zeros((m, m))
    for j in range(m):
        if not inside[here[j]]:
            continue
        row = {n: 1 / (1 + math.exp(-logits[here[j]][n - j + 1])) for n in (j - 1, j, j + 1) if 0 <= n < m}
        row = {n: s for n, s in row.items() if inside[before[n]]}
        for n, s in row.items():
            step[j, n] = s / max(sum(row.values()), 1e-7)
    return step


def flat(a: np.ndarray, order: list) -> np.ndarray:
    """A map [H, W] as a vector in the order of the scan."""
    return np.array([a[position] for line in order for position in line])


def unflat(vector: np.ndarray, order: list, shape: tuple[int, int]) -> np.ndarray:
    out = np.zeros(shape)
    for position, value in zip(itertools.chain(*order), vector, strict=True):
        out[position] = value
    return out


def oracle_propagate(tensors: list[Tensor], directions: tuple[str, ...], mask: Tensor | None) -> tuple[Tensor, ...]:
    """y [B, H, W, D, C] and, for an all-ones gradient of its sum over D, the gradients to x, lam and u."""
    x, logits, lam, u = (t.numpy() for t in tensors)
    b, h, w, c = x.shape
    y, dx, dlam, du = np.zeros(u.shape), np.zeros(x.shape), np.zeros(u.shape), np.zeros(u.shape)
    for n, ch, (d, name) in itertools.product(range(b), range(c), enumerate(directions)):
        order = scan_order(name, h, w)
        inside = np.ones((h, w), bool) if mask is None else mask[n].numpy()
        steps = [
            normalised_step(logits[n, :, :, d, :, ch], here, order[max(i - 1, 0)], inside)
            for i, here in enumerate(order)
        ]
        kept = flat(inside, order)
        dense = affinity(steps) * np.outer(kept, kept)
        scale, gate, features = (flat(t, order) for t in (lam[n, :, :, d, ch], u[n, :, :, d, ch], x[n, ..., ch]))
        state = dense @ (scale * features)
        back = dense.T @ gate
        for out, vector in ((y, gate * state), (du, state), (dlam, back * features)):
            out[n, :, :, d, ch] = unflat(vector * kept, order, (h, w))
        dx[n, :, :, ch] += unflat(back * scale, order, (h, w))
    return tuple(torch.from_numpy(a) for a in (y, dx, dlam, du))


def test_the_oracle_itself() -> None:
    """Where every logit is equal and lam and u are one, the last line of a 2 x 3 grid can be written down."""
    x = torch.tensor([[1.0, 2, 4], [8, 16, 32]], dtype=torch.float64)[None, :, :, None]
    ones = torch.ones(1, 2, 3, 1, 1, dtype=torch.float64)
    y, *_ = oracle_propagate([x, torch.zeros(1, 2, 3, 1, 3, 1, dtype=torch.float64), ones, ones], ("down",), None)
    assert y.flatten().tolist() == pytest.approx([1, 2, 4, 8 + 3 / 2, 16 + 7 / 3, 32 + 6 / 2])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_propagate_is_the_dense_product(grid: tuple[int, int], masked: bool) -> None:
    tensors = propagate_inputs((2, *grid, 2))
    mask = draw(2, *grid, seed=5) > -0.5 if masked else None
    want, dx, dlam, du = oracle_propagate(tensors, DIRECTIONS, mask)
    x, logits, lam, u = (t.detach().requires_grad_() for t in tensors)
    y = propagate_2d_reference(x, logits, lam, u, merge="none", mask=mask)
    torch.testing.assert_close(y, want)
    y.sum().backward()
    for got, wanted in ((x.grad, dx), (lam.grad, dlam), (u.grad, du)):
        torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(propagate_2d_reference(x, logits, lam, u, mask=mask), want.sum(3))


@pytest.mark.parametrize("directions", SUBSETS, ids=" ".join)
def test_any_subset_in_any_order(directions: tuple[str, ...]) -> None:
    tensors = propagate_inputs((1, 3, 2, 1), len(directions))
    want, *_ = oracle_propagate(tensors, directions, None)
    torch.testing.assert_close(propagate_2d_reference(*tensors, directions=directions, merge="none"), want)
    torch.testing.assert_close(propagate_2d_reference(*tensors, directions=directions), want.sum(3))


def test_the_reference_knows_no_other_names() -> None:
    tensors = propagate_inputs((1, 3, 2, 1), 1)
    with pytest.raises(ValueError, match="tuple"):
        propagate_2d_reference(*tensors, directions=("diagonal",))
    with pytest.raises(KeyError, match="mean"):
        propagate_2d_reference(*tensors, directions=("down",), merge="mean")


def test_the_clamp() -> None:
    """Sigmoids that add up to less than 1e-7 are divided by 1e-7: less than everything is passed on."""
    x, logits, lam, u = propagate_inputs((1, 3, 3, 1))
    logits = logits.clone()
    logits[:, 1] = -20.0
    want, *_ = oracle_propagate([x, logits, lam, u], DIRECTIONS, None)
    torch.testing.assert_close(propagate_2d_reference(x, logits, lam, u, merge="none"), want)
    assert 3 / (1 + math.exp(20)) < 1e-7  # the case does reach the clamp


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("chunk", [None, 1, 2, 3, 9])
@pytest.mark.parametrize("grid", [(4, 3), (3, 4), (1, 4), (4, 1)], ids=str)
def test_line_scan_is_the_dense_product(grid: tuple[int, int], direction: str, chunk: int | None) -> None:
    x, weights, lam = line_scan_inputs((2, *grid, 2))
    order = scan_order(direction, *grid)
    m = len(order[0])
    got = line_scan_reference(x, weights, lam, direction, chunk)
    for n, c in itertools.product(range(2), range(2)):
        steps = []
        for i, line in enumerate(order):
            step = np.zeros((m, m))
            if not (chunk and i % chunk == 0):
                for j, k in itertools.product(range(m), (-1, 0, 1)):
                    if 0 <= j + k < m:
                        step[j, j + k] = weights[n, line[j][0], line[j][1], k + 1, c]
            steps.append(step)
        drive = flat((lam * x)[n, :, :, c].numpy(), order)
        want = unflat(affinity(steps) @ drive, order, grid)
        torch.testing.assert_close(got[n, :, :, c], torch.from_numpy(want))


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("masked", [False, True])
def test_derivatives_of_the_reference(masked: bool) -> None:
    mask = torch.tensor([[[True, True, False], [False, True, True]]]) if masked else None
    tensors = leaves(propagate_inputs((1, 2, 3, 1)))
    assert torch.autograd.gradcheck(lambda *t: propagate_2d_reference(*t, mask=mask), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: propagate_2d_reference(*t, mask=mask), tensors)
    tensors = leaves(line_scan_inputs((1, 3, 3, 1)))
    assert torch.autograd.gradcheck(lambda *t: line_scan_reference(*t, "left", 2), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: line_scan_reference(*t, "left", 2), tensors)


@every_backend
@pytest.mark.parametrize("merge", ["sum", "none"])
def test_derivatives_of_propagate(backend, merge: str) -> None:
    skip_unless_supported(backend, torch.empty(0, dtype=torch.float64, device=backend.device))
    mask = torch.tensor([[[True, True, False], [True, True, True]]], device=backend.device)
    tensors = leaves(propagate_inputs((1, 2, 3, 1), 2, device=backend.device))

    def run(*t: Tensor) -> Tensor:
        return propagate_2d(*t, directions=("up", "right"), merge=merge, mask=mask, backend=backend.name)

    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


@every_backend
@pytest.mark.parametrize("chunk", [None, 2])
def test_derivatives_of_line_scan(backend, chunk: int | None) -> None:
    skip_unless_supported(backend, torch.empty(0, dtype=torch.float64, device=backend.device))
    tensors = leaves(line_scan_inputs((1, 3, 3, 1), device=backend.device))
    assert torch.autograd.gradcheck(lambda *t: line_scan(*t, "right", chunk, backend=backend.name), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: line_scan(*t, "right", chunk, backend=backend.name), tensors)
