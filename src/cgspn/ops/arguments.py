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
