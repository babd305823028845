"""The scan with a normalised state: a weighted mean of what it has seen in place of a sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from .propagate import propagate_2d
from .reference import DIRECTIONS


def propagate_2d_normalised(
    x: Tensor,
    logits: Tensor,
    lam: Tensor,
    u: Tensor,
    *,
    keep: Tensor | None = None,
    directions: Sequence[str] = DIRECTIONS,
    merge: str = "sum",
    mask: Tensor | None = None,
    scan: Callable[..., Tensor] = propagate_2d,
) -> Tensor:
    """Scan as in `propagate_2d`, and divide each state by the sum of its weights.

    With h as in `propagate_2d` and n the same recurrence over an input of ones::

        y[i] = u[i] * h[i] / n[i]

    The output does not grow with the number of lines. Not in the paper; see results/resolution.

    Args:
        x, logits, lam, u, keep, directions, merge, mask: as in `propagate_2d`; lam above 0.
        scan: `propagate_2d`, or what takes its arguments.

    Returns as `propagate_2d`. Raises as it does.
    """
    options = {"keep": keep, "directions": directions, "merge": merge, "mask": mask}
    return scan(x, logits, lam, u, **options, normalise_state=True)
