"""Dataclasses that carry the arguments of an operator from the public function through the custom op to a backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

# the schema of the custom op, in the order of `Scan`; the last field of `Scan` belongs to `line_scan` only
SCAN_SCHEMA = (
    "Tensor x, Tensor logits, Tensor lam, Tensor u, Tensor? keep, Tensor? mask, int[] directions, bool merge_sum, "
    "str backend, bool normalise_state=False"
)


class Scan(NamedTuple):
    """The checked arguments of `propagate_2d`, with the same shapes; `directions` are indices into DIRECTIONS.

    If `u` is None, this is a `line_scan` with given weights, which restarts every `chunk` lines (0: never).
    """

    x: Tensor
    logits: Tensor
    lam: Tensor
    u: Tensor | None
    keep: Tensor | None = None
    mask: Tensor | None = None
    directions: Sequence[int] = (0, 1, 2, 3)
    merge_sum: bool = True
    backend: str = "auto"
    normalise_state: bool = False
    chunk: int = 0

    @property
    def share(self) -> int:
        """Number of channels per parameter group."""
        return self.x.shape[-1] // self.lam.shape[-1]

    @property
    def maps(self) -> tuple[int, ...]:
        """The shape of a state, or of outputs before the sum over directions: [B, H, W, D, C]."""
        return (*self.x.shape[:3], len(self.directions), self.x.shape[-1])

    @property
    def output(self) -> tuple[int, ...]:
        """The shape of the output."""
        return (*self.x.shape[:3], self.x.shape[-1]) if self.merge_sum else self.maps


LINE_SCAN_SCHEMA = "Tensor x, Tensor weights, Tensor lam, int direction, int? chunk, str backend"


def given_scan(
    x: Tensor, weights: Tensor, lam: Tensor, direction: int = 0, chunk: int | None = None, backend: str = "auto"
) -> Scan:
    """The `Scan` for the checked arguments of `line_scan`. `direction` is an index into DIRECTIONS."""
    given = weights.unsqueeze(3), lam.unsqueeze(3), None
    return Scan(x, *given, directions=(direction,), backend=backend, chunk=chunk or 0)


PARAMETERS = 5  # maps per direction in the projection's output: lam, u, three logits
PROJECTED_SCHEMA = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? mask, int[] directions, bool merge_sum, str parameters, str backend"
)


class ProjectedScan(NamedTuple):
    """The checked arguments of `propagate_2d_projected`, with the same shapes; `directions` as in `Scan`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    mask: Tensor | None = None
    directions: Sequence[int] = (0, 1, 2, 3)
    merge_sum: bool = True
    parameters: str = "auto"
    backend: str = "auto"

    def scan(self, packed: Tensor) -> Scan:
        """The `Scan` whose parameters are the projection's output [B, H, W, D * 5 * C]."""
        made = split_parameters(packed, len(self.directions))
        return Scan(self.x, *made, None, self.mask, self.directions, self.merge_sum, self.backend)


def split_parameters(packed: Tensor, directions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, lam and u as views of the projection's output [B, H, W, D * 5 * C]."""
    # The gradient of one split is a concatenation; that of three slices would be a sum of three zero-filled maps.
    shape = (*packed.shape[:-1], directions, PARAMETERS, packed.shape[-1] // (directions * PARAMETERS))
    lam, u, logits = packed.view(shape).split([1, 1, 3], -2)
    return logits, lam.squeeze(-2), u.squeeze(-2)
