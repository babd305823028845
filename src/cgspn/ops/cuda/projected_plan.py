"""Tile sizes of a projected scan."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from ..arguments import PARAMETERS
from ..gpu import Machine

MOST_CHANNELS = 64  # with more, weights do not fit in registers and products take longer than memory access


@dataclass(frozen=True)
class ProjectedTileConfig:
    """Tile sizes: `groups` of 16 channels per block, `row_warps` warps along a line with `tiles` tiles of 8 positions
    each, and `stages` lines of x in shared memory.
    """

    groups: int
    row_warps: int
    tiles: int
    stages: int = 2  # a third stage did not help on an H100

    @property
    def threads(self) -> int:
        """Block size."""
        return 32 * self.groups * self.row_warps

    @property
    def line(self) -> int:
        """Number of positions that fit in a block."""
        return 8 * self.row_warps * self.tiles

    def blocks(self, batch: int, channels: int, directions: int) -> int:
        """Number of blocks of a launch."""
        return batch * -(-channels // (16 * self.groups)) * directions

    def shared_bytes(self, channels: int) -> int:
        """Dynamic shared memory of a block, in the order of the kernel's layout."""
        padded = depth(channels)
        lines = self.stages * 2 * self.line * padded
        outputs = 64 * self.line * self.groups
        states = 2 * self.groups * (self.line + 2) * 80
        weights = self.groups * PARAMETERS * padded * 32
        return lines + outputs + states + weights

    def fits(self, channels: int, gpu: Machine) -> bool:
        """Whether a block has the threads, registers (as scripts/check_kernels.py found) and shared memory it needs."""
        needed = 85 + depth(channels) * 40 // 32 + 4 * self.tiles
        allowed = min(255, 65536 // (-(-self.threads // 128) * 128))
        return self.shared_bytes(channels) <= gpu.shared_bytes and self.threads <= 1024 and needed <= allowed


def depth(channels: int) -> int:
    """The inner size of a product: the channels, rounded up to what a thread passes to the tensor core at once."""
    return -(-channels // 32) * 32


def cuts(longest: int, channels: int, gpu: Machine) -> Iterator[ProjectedTileConfig]:
    """Every tile config that covers lines of `longest` positions and fits."""
    needed = -(-longest // 8)
    for groups in (4, 2, 1):
        for tiles in (5, 4, 3, 2, 1) if needed <= 40 else (8, 5):
            row_warps = -(-needed // tiles)
            wasted = tiles > needed or ((row_warps * tiles - needed) * 4 > needed and tiles > 1)
            if groups * 16 >= channels + 16 or wasted:
                continue
            cut = ProjectedTileConfig(groups, row_warps, tiles)
            if cut.fits(channels, gpu):
                yield cut


@functools.lru_cache(maxsize=1024)
def choose(batch: int, longest: int, channels: int, directions: int, gpu: Machine) -> ProjectedTileConfig | None:
    """The tile config, or None if lines are too long.

    From sweeps on an H100 (results/operator). With up to two blocks of 16 channels per SM, latency dominates: use as
    many warps per line as fit. With more blocks, other blocks hide latency, and the amount of work counts: a position,
    padding included, takes a sixth less time in warps of 3 or 5 tiles, and wide blocks read x less often, if they fill
    the GPU.
    """
    found = list(cuts(longest, channels, gpu))
    narrow = min((cut.groups for cut in found), default=1)
    if batch * -(-channels // 16) * directions <= 2 * gpu.num_sms:
        return min((cut for cut in found if cut.groups == narrow), key=lambda cut: cut.tiles, default=None)
    filling = [cut for cut in found if cut.groups == narrow or cut.blocks(batch, channels, directions) >= _most(gpu)]
    return min(filling, key=lambda cut: (cut.line * (5 if cut.tiles in (3, 5) else 6), -cut.groups), default=None)


def is_faster(batch: int, longest: int, channels: int, directions: int, gpu: Machine) -> bool:
    """Whether this is faster than a separate projection and scan. On an H100 it is if at least a third of the SMs have
    a block; with fewer, latency dominates.
    """
    fits = choose(batch, longest, channels, directions, gpu) is not None
    return fits and batch * -(-channels // 16) * directions >= gpu.num_sms // 3


def _most(gpu: Machine) -> float:
    """The number of blocks that leaves few SMs idle."""
    return gpu.num_sms * 0.75
