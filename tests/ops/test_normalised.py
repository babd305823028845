import pytest
import torch
from operator_cases import relative_error

from cgspn.ops import propagate_2d_normalised, propagate_2d_reference


def maps(b=2, h=5, w=4, d=2, groups=3, each=2, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(b, h, w, groups * each, dtype=torch.float64)
    logits = torch.randn(b, h, w, d, 3, groups, dtype=torch.float64)
    lam, u, keep = (torch.randn(b, h, w, d, groups, dtype=torch.float64) for _ in range(3))
    return x, logits, torch.nn.functional.softplus(lam), u, keep


@pytest.mark.parametrize("merge", ["sum", "none"])
def test_it_is_the_scan_over_the_scan_of_ones(merge):
    x, logits, lam, u, keep = maps()
    shared = {"keep": keep, "directions": ("down", "left"), "merge": "none"}
    ones = torch.ones_like(x)
    expected = propagate_2d_reference(x, logits, lam, u, **shared)
    expected = expected / propagate_2d_reference(ones, logits, lam, torch.ones_like(u), **shared)
    found = propagate_2d_normalised(x, logits, lam, u, **(shared | {"merge": merge}))
    assert relative_error(found, expected.sum(3) if merge == "sum" else expected) < 1e-12


def test_a_constant_stays_what_it_is_however_many_lines_there_are():
    for lines in (3, 30):
        _, logits, lam, u, keep = maps(h=lines)
        x = torch.full((2, lines, 4, 6), 2.5, dtype=torch.float64)
        y = propagate_2d_normalised(
            x, logits, lam, torch.ones_like(u), keep=keep, directions=("up", "right"), merge="none"
        )
        torch.testing.assert_close(y, torch.full_like(y, 2.5))


def test_padding_is_zero_and_changes_nothing():
    x, logits, lam, u, keep = maps(w=6)
    mask = torch.ones(2, 5, 6, dtype=torch.bool)
    mask[:, :, 4:] = False
    wide = propagate_2d_normalised(x, logits, lam, u, keep=keep, directions=("down", "left"), mask=mask)
    alone = propagate_2d_normalised(
        *(t[:, :, :4] for t in (x, logits, lam, u)), keep=keep[:, :, :4], directions=("down", "left")
    )
    assert not wide[:, :, 4:].any()
    torch.testing.assert_close(wide[:, :, :4], alone)
