"""Arguments that travel together: from the public functions through the custom ops to a backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

# as a custom op takes them, in the order of `Scan`
SCAN_SCHEMA = (
    "Tensor x, Tensor logits, Tensor lam, Tensor u, Tensor? keep, Tensor? mask, int[] directions, bool merge_sum, "
    "str backend, bool normalise_state=False"
)


class Scan(NamedTuple):
    """The arguments of `propagate_2d`, checked. Shapes as there; `directions` are indices into DIRECTIONS."""

    x: Tensor
    logits: Tensor
    lam: Tensor
    u: Tensor
    keep: Tensor | None = None
    mask: Tensor | None = None
    directions: Sequence[int] = (0, 1, 2, 3)
    merge_sum: bool = True
    backend: str = "auto"
    normalise_state: bool = False

    @property
    def share(self) -> int:
        """Channels that have one set of parameters between them."""
        return self.x.shape[-1] // self.lam.shape[-1]

    @property
    def maps(self) -> tuple[int, ...]:
        """The shape of a state or of outputs that are not summed: [B, H, W, D, C]."""
        return (*self.x.shape[:3], len(self.directions), self.x.shape[-1])

    @property
    def output(self) -> tuple[int, ...]:
        """The shape of the output."""
        return (*self.x.shape[:3], self.x.shape[-1]) if self.merge_sum else self.maps


LINE_SCAN_SCHEMA = "Tensor x, Tensor weights, Tensor lam, int direction, int? chunk, str backend"


class GivenScan(NamedTuple):
    """The arguments of `line_scan`, checked: the scan whose weights are given. `direction` is an index."""

    x: Tensor
    weights: Tensor
    lam: Tensor
    direction: int = 0
    chunk: int | None = None
    backend: str = "auto"


PARAMETERS = 5  # maps a direction that a projection makes: lam, u, three logits
PROJECTED_SCHEMA = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? mask, int[] directions, bool merge_sum, str parameters, str backend"
)


class ProjectedScan(NamedTuple):
    """The arguments of `propagate_2d_projected`, checked. Shapes as there; `directions` as in `Scan`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    mask: Tensor | None = None
    directions: Sequence[int] = (0, 1, 2, 3)
    merge_sum: bool = True
    parameters: str = "auto"
    backend: str = "auto"

    def scan(self, packed: Tensor) -> Scan:
        """The scan with the parameters that the projection made: [B, H, W, D * 5 * C]."""
        made = split_parameters(packed, len(self.directions))
        return Scan(self.x, *made, None, self.mask, self.directions, self.merge_sum, self.backend)


def split_parameters(packed: Tensor, directions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, lam and u, views of what the projection makes: [B, H, W, D * 5 * C]."""
    # One split, not three slices: its gradient is one concatenation instead of three zero-filled maps added up.
    shape = (*packed.shape[:-1], directions, PARAMETERS, packed.shape[-1] // (directions * PARAMETERS))
    lam, u, logits = packed.view(shape).split([1, 1, 3], -2)
    return logits, lam.squeeze(-2), u.squeeze(-2)
