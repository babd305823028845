"""Tile sizes of a scan: channels per thread, vectors and positions per block, lines prefetched, blocks per line.

A block scans one direction of one image for `lanes` vectors of `vec` channels. Wide vectors and many lanes read memory
in long runs. Narrow vectors and few lanes make more blocks, which a small batch needs to fill the GPU. For every
position and map the load/store unit handles one cache line, however few of its bytes a block uses. With small batches,
the cost of a line is therefore the number of cache lines, not of bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from ..gpu import Machine

MAX_THREADS = 1024


@dataclass(frozen=True)
class Problem:
    """The properties of a call that a plan depends on.

    alignment: bytes that divide every address and stride. share: channels per parameter group; if more than one, a
    thread handles that many. keep: there is a forget gate. sideways: some direction is right or left. mean: n is
    scanned too, and the state is divided by it.
    """

    backward: bool
    normalise: bool
    itemsize: int
    batch: int
    channels: int
    directions: int
    longest: int  # of height and width
    alignment: int
    share: int = 1
    keep: bool = False
    sideways: bool = True
    mean: bool = False

    @property
    def name(self) -> str:
        """The name of the kernel source."""
        return "backward" if self.backward else "forward"

    @property
    def maps(self) -> int:
        """Number of input maps that pass through shared memory."""
        if self.share > 1:
            return 1 + 2 * self.backward
        return 5 + self.normalise + self.keep + 2 * self.backward


@dataclass(frozen=True)
class TileConfig:
    """Tile sizes: `vec` channels of a position per thread, `lanes` vectors per block, `stages` lines prefetched,
    `split` blocks per line.

    halo: if lines are split, the number of further positions on either side that a block scans. Blocks exchange states
    every `halo` lines.
    """

    vec: int
    lanes: int
    stages: int
    split: int = 1
    halo: int = 1

    def own(self, p: Problem) -> int:
        """Number of positions of a line that a block writes."""
        return -(-p.longest // self.split)

    def halo_width(self) -> int:
        """The halo's width on either side; 0 if lines are not split."""
        return self.halo if self.split > 1 else 0

    def rows(self, p: Problem) -> int:
        """Number of positions a block processes."""
        return self.own(p) + 2 * self.halo_width()

    def blocks(self, p: Problem) -> int:
        """Number of blocks of a launch."""
        return p.batch * self.groups(p) * self.split * p.directions

    def threads(self, p: Problem) -> int:
        """Block size, in whole warps."""
        return -(-self.rows(p) * self.lanes // 32) * 32

    def groups(self, p: Problem) -> int:
        """Number of blocks along the channels."""
        return -(-p.channels // (self.vec * self.lanes))

    def shared_bytes(self, p: Problem) -> int:
        """Dynamic shared memory of a block: lines of float32 state, then stages of the backward."""
        places, vectors = self.rows(p), self.lanes * self.vec
        counts = p.mean * self.lanes * (1 if p.share > 1 else self.vec)  # of parameter groups
        state = (4 if p.backward else 2) * (places + 2) * (vectors + counts) * 4
        state += 4 * self.halo_width() * (3 if p.backward else 1) * (1 + p.mean) * vectors * 4  # mailboxes
        if p.backward:
            state += -(-self.stages * p.maps * places * vectors * p.itemsize // 16) * 16
            return state + self.stages * places * counts * 4
        return state  # the forward's stages are in registers

    def partial_sector(self, p: Problem) -> bool:
        """Whether the memory next to a block's channels is read by another block, or by this one in the next line.

        In a sideways scan the next line lies in the same 128 bytes, which should be read from memory together.
        """
        run = self.lanes * self.vec * p.itemsize
        return (run < 32 and self.groups(p) > 1) or (run <= 32 and p.sideways)

    def thread_bound(self, p: Problem) -> int:
        """The block size for which a kernel is compiled, in coarse steps, so that few kernels serve all image sizes."""
        return next(bound for bound in (128, 256, 384, 512, 640, MAX_THREADS) if self.threads(p) <= bound)

    def fits(self, p: Problem, machine: Machine) -> bool:
        """Whether a block has the threads, registers and shared memory it needs."""
        if self.threads(p) > MAX_THREADS or self.shared_bytes(p) > machine.shared_bytes:
            return False
        if self.split > 1 and self.own(p) < self.halo:
            return False
        if not p.backward and self.vec * p.itemsize * self.stages > 48:
            return False
        return self.vec <= 8 and (self.threads(p) <= 640 or self.vec <= 2)  # wider vectors take more registers


def _vectors(p: Problem) -> Iterator[int]:
    """Possible channels per thread, widest first: powers of two that the channels and all addresses allow."""
    if p.share > 1:
        yield p.share
        return
    vec = 16 // p.itemsize
    while vec > 1:
        if p.channels % vec == 0 and p.alignment % (vec * p.itemsize) == 0:
            yield vec
        vec //= 2
    yield 1


def _lanes(p: Problem, vec: int, run: int) -> int:
    """Vectors per block for runs of about `run` bytes, at most all channels, and the same for all blocks."""
    vectors = -(-p.channels // vec)
    lanes = 1
    while lanes * 2 * vec * p.itemsize <= run and (lanes * 2 * vec <= p.channels or (p.share > 1 and lanes < vectors)):
        lanes *= 2
    return -(-vectors // -(-vectors // lanes))


def choose(p: Problem, machine: Machine) -> TileConfig | None:
    """The tile config for a problem, or None if its lines are too long for every config.

    From sweeps on an H100 (results/operator): read runs of 128 bytes if most SMs then have a block. Otherwise split
    lines in two before halving the runs, and in more parts if a line does not fit in one block or runs would be shorter
    than a sector. Short lines use narrow vectors instead, because a cluster costs more than it saves.
    """
    vectors = list(_vectors(p))
    if (cut := _alone(p, machine, vectors)) is not None:
        return cut
    wide = vectors[0]
    enough = machine.num_sms * 7 // 10
    clusters = machine.clusters and p.longest >= 64
    # With parameter groups a thread accesses single parameters, and its neighbours fill the sector. So the backward is
    # faster with many lanes (0.57 ms instead of 0.79 at B = 32, 74x74, 4 x 96 channels), the forward with whole lines.
    if p.share > 1 and not p.backward:
        for run in (128, 64):
            cut = _whole(p, machine, wide, run)
            if cut is not None and cut.blocks(p) >= enough:
                return cut
    for run in (256, 128, 64, 32) if p.share > 1 and p.backward else (128, 64, 32):
        for split in (1, 2, 4, 8) if clusters else (1,):
            if split > 2 and p.longest // split < 25:
                continue
            cut = _parts(p, machine, vectors, run, split) if split > 1 else _whole(p, machine, wide, run)
            if cut is None:
                continue
            least = enough
            if run == 32 and (split == 4 or not clusters):
                # Runs below a sector waste the load/store unit, which costs more than idle SMs.
                least = machine.num_sms // 3
            elif split > 2:
                least = enough * split // 2  # many parts wait for each other, so they need more blocks
            if cut.blocks(p) >= least:
                return cut
    # Too few blocks: use finer tiles.
    for split in () if not clusters else (2,) if p.longest < 100 else (4, 2, 8):
        if (cut := _parts(p, machine, vectors, 8 * p.itemsize, split)) is not None:
            return cut
    vec = next((v for v in vectors if v <= 2), vectors[-1])
    fine = TileConfig(vec, _lanes(p, vec, 8), 3)
    if fine.fits(p, machine) and fine.threads(p) <= 640:
        return fine
    # Otherwise take the first config that fits.
    depths = (3, 2) if p.backward else (3, 2, 1)
    for vec, split, stages in product(vectors, (1, 2, 4, 8) if machine.clusters else (1,), depths):
        if (cut := TileConfig(vec, 1, stages, split)).fits(p, machine):
            return cut
    return None


def _alone(p: Problem, machine: Machine, vectors: list[int]) -> TileConfig | None:
    """Lines split into the most parts with two channels per thread, if each block gets an SM; otherwise None.

    From sweeps over 320 configs at B = 1 (results/operator), only for the forward in 16 bits: 3 to 13% less time than
    more channels per thread and fewer parts.
    """
    if p.backward or not machine.clusters or not p.normalise or p.keep or p.mean or p.share > 1 or p.itemsize != 2:
        return None
    if p.longest < 64 or 2 not in vectors:
        return None
    lanes, split, halos = (4, 2, (16,)) if p.longest < 80 else (8, 8, (8, 4))
    for halo in halos:
        cut = TileConfig(2, min(lanes, max(1, p.channels // 2)), 4, split, halo)
        # with more threads a wide halo costs more than it saves; a narrow one was not measured
        if cut.fits(p, machine) and cut.threads(p) <= 384:
            return cut if cut.blocks(p) <= machine.num_sms else None
    return None


def _whole(p: Problem, machine: Machine, vec: int, run: int) -> TileConfig | None:
    """A config with unsplit lines in runs of about `run` bytes, if it fits."""
    lanes = _lanes(p, vec, run)
    cut = TileConfig(vec, lanes, (3 if vec * p.itemsize * lanes <= 32 else 2) if p.backward else 1)
    return cut if cut.fits(p, machine) and cut.threads(p) <= 640 else None


def _parts(p: Problem, machine: Machine, vectors: list[int], run: int, split: int) -> TileConfig | None:
    """A config with lines split across a cluster, in runs of about `run` bytes, if it fits.

    From the same sweeps: runs of up to 32 bytes (64 in the forward) use vectors of 8 bytes, for more threads. If every
    block has its own SM, it waits for its neighbours and for memory. A wide halo then makes exchanges rare, and three
    lines are prefetched. Several blocks per SM hide these waits.
    """
    narrow = next((v for v in vectors if v == 1 or v * p.itemsize <= 8), vectors[-1])
    short = run <= (32 if p.backward else 64)
    for vec in (narrow, vectors[0]) if short else vectors[:1]:
        lanes = _lanes(p, vec, run)
        alone = TileConfig(vec, lanes, 1, split).blocks(p) <= machine.num_sms
        seldom = 32 // split
        ways = [(seldom, 3), (4, 3), (seldom, 2), (4, 2)] if alone else []
        stages = (3 if run <= 32 else 2) if p.backward else 2 if run <= 64 else 1
        last = [] if p.backward else [(4, 1)]
        for halo, depth in (*ways, (4, stages), (2, stages), *last) if vec == vectors[0] else (*ways, (4, stages)):
            cut = TileConfig(vec, lanes, depth, split, halo)
            if not cut.fits(p, machine) or cut.threads(p) > 640 or _spills(cut, p):
                continue
            if (halo, depth) not in ways or _leaves_room(cut, p, machine):
                return cut
    return None


def _spills(cut: TileConfig, p: Problem) -> bool:
    """Whether two lines of four float32 channels and their weights exceed the registers of a large block."""
    large = not p.backward and p.normalise and cut.threads(p) > 512
    return large and cut.stages > 1 and cut.vec * p.itemsize == 16 and p.itemsize == 4


def _leaves_room(cut: TileConfig, p: Problem, machine: Machine) -> bool:
    """Whether prefetched lines leave registers for the arithmetic or, with long runs, memory for the L1 cache."""
    width = cut.vec * p.itemsize
    if p.backward:
        return width * cut.lanes <= 32 or cut.shared_bytes(p) <= machine.shared_bytes * 3 // 4
    return cut.stages < 3 or width <= 8 or cut.threads(p) <= 512
