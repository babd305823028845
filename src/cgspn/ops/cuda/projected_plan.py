"""How a projected scan is cut into blocks, warps and tiles, and how many images its backward takes at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .plan import Machine

PARAMETERS = 5  # of the projection a direction: lam, u, three logits
KEPT = 64  # channels up to which the weights stay in registers
OUTPUTS = 6  # maps that the backward kernel writes a direction: their gradients, and what reaches x past them


@dataclass(frozen=True)
class ProjectedCut:
    """How a projected scan is cut: `groups` of 16 channels a block, `row_warps` along a line with `tiles` of 8
    positions each, `stages` lines of x in shared memory.

    turns: a block takes the directions in turn and adds them up where its output lies; otherwise a block takes one,
    and a sum needs planes that are merged afterwards.
    """

    groups: int
    row_warps: int
    tiles: int
    stages: int = 3
    turns: bool = False

    @property
    def threads(self) -> int:
        """Block size."""
        return 32 * self.groups * self.row_warps

    @property
    def line(self) -> int:
        """Positions that a block has room for."""
        return 8 * self.row_warps * self.tiles

    def blocks(self, batch: int, channels: int, directions: int) -> int:
        """Blocks of a launch."""
        return batch * -(-channels // (16 * self.groups)) * (1 if self.turns else directions)

    def shared_bytes(self, channels: int, backward: bool) -> int:
        """Dynamic shared memory of a block, in the order in which the kernels lay it out."""
        padded = depth(channels)
        own = 32 * self.line * self.groups  # bytes of a line of the block's own channels
        lines = self.stages * (2 * self.line * padded + (2 * own if backward else 0))
        outputs = 2 * own * (OUTPUTS if backward else 1)
        states = (4 if backward else 2) * self.groups * (self.line + 2) * 80
        weights = self.groups * PARAMETERS * padded * 32
        return lines + outputs + states + weights

    def fits(self, channels: int, gpu: Machine, backward: bool) -> bool:
        """Whether a block has the threads, registers (as scripts/check_kernels.py found) and shared memory it needs."""
        weights = depth(channels) * 40 // 32 if depth(channels) <= KEPT else 60  # kept, or read from shared memory
        needed = 100 + weights + 25 * self.tiles if backward else 85 + weights + 4 * self.tiles
        allowed = min(255, 65536 // (-(-self.threads // 128) * 128))
        room = self.shared_bytes(channels, backward) <= gpu.shared_bytes
        return room and self.threads <= 1024 and needed <= allowed


def depth(channels: int) -> int:
    """The channels that a product sums over: a multiple of what a thread feeds the tensor core at once."""
    return -(-channels // 32) * 32


def cuts(longest: int, channels: int, gpu: Machine, backward: bool = False) -> Iterator[ProjectedCut]:
    """Every cut that covers lines of `longest` positions and fits."""
    needed = -(-longest // 8)
    for groups in (4, 2, 1):
        for tiles in (5, 4, 3, 2, 1) if needed <= 40 else (8, 5):
            row_warps = -(-needed // tiles)
            wasted = tiles > needed or ((row_warps * tiles - needed) * 4 > needed and tiles > 1)
            if groups * 16 >= channels + 16 or wasted:
                continue
            for turns in (False,) if backward else (False, True):
                depths = (2,) if backward else (3, 2)
                found = (ProjectedCut(groups, row_warps, tiles, stages, turns) for stages in depths)
                yield from [cut for cut in found if cut.fits(channels, gpu, backward)][:1]


def choose(batch: int, longest: int, channels: int, directions: int, merged: bool, gpu: Machine) -> ProjectedCut | None:
    """The forward's cut, or None where lines are too long. By estimate, until it is measured.

    Enough blocks for the machine first; then wide blocks, which read x less often; then about 8 warps for each of the
    processors; the directions in turn where blocks are enough without them.
    """
    return _best(list(cuts(longest, channels, gpu)), batch, channels, directions, gpu, merged)


def choose_backward(batch: int, longest: int, channels: int, directions: int, gpu: Machine) -> ProjectedCut | None:
    """As `choose`, for the backward."""
    return _best(list(cuts(longest, channels, gpu, True)), batch, channels, directions, gpu, False)


def _best(
    found: list[ProjectedCut], batch: int, channels: int, directions: int, gpu: Machine, turns: bool
) -> ProjectedCut | None:
    def worth(cut: ProjectedCut) -> tuple[float, ...]:
        blocks = cut.blocks(batch, channels, directions)
        filled = min(1.0, blocks / (gpu.processors * 0.75))
        return filled, cut.turns and turns, min(cut.groups, 2 if cut.turns else 4), -abs(cut.threads / 32 - 10)

    allowed = [cut for cut in found if turns or not cut.turns]
    return max(allowed, key=worth, default=None)


def images(batch: int, cut: ProjectedCut, channels: int, directions: int, gpu: Machine) -> int:
    """Images that the backward takes at once: enough to fill the machine twice, in chunks of one size."""
    enough = -(-2 * gpu.processors // cut.blocks(1, channels, directions))
    chunks = max(1, batch // max(1, enough))
    return max(1, -(-batch // chunks))
