"""How a scan is cut into blocks: channels a thread, vectors and positions a block, lines in flight, blocks a line.

A block walks one direction of one image for `lanes` vectors of `vec` channels. Wide vectors and many lanes read
memory in long runs; few of them make more blocks, which a small batch needs to fill the machine. Every position and
map costs the load/store unit one cache line however few of its bytes a block wants: that, and not the bytes, is what
a line costs at small batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

MAX_THREADS = 1024


@dataclass(frozen=True)
class Machine:
    """What a plan has to know about the GPU."""

    processors: int
    shared_bytes: int  # a block may take at most this
    clusters: bool


@dataclass(frozen=True)
class Problem:
    """What a plan has to know about the call. `alignment`: bytes that divide every address and stride."""

    backward: bool
    normalise: bool
    itemsize: int
    batch: int
    channels: int
    directions: int
    longest: int  # of height and width
    alignment: int

    @property
    def name(self) -> str:
        """Of the kernel's source."""
        return "backward" if self.backward else "forward"

    @property
    def maps(self) -> int:
        """Input maps that pass through shared memory."""
        return 5 + self.normalise + 2 * self.backward


@dataclass(frozen=True)
class Cut:
    """One way to cut: `vec` channels and `pos` positions a thread, `lanes` vectors a block, `stages` lines in flight,
    lines cut into `split` blocks.

    halo: positions beyond its own, on either side, that a block of a cut line scans too; the blocks exchange states
        once in as many lines.
    """

    vec: int
    lanes: int
    pos: int
    stages: int
    split: int = 1
    halo: int = 1

    def own(self, p: Problem) -> int:
        """Positions of a line that a block writes."""
        return -(-p.longest // self.split)

    def beyond(self) -> int:
        """The halo's width on either side; none where lines are whole."""
        return self.halo if self.split > 1 else 0

    def rows(self, p: Problem) -> int:
        """Positions a block handles at once."""
        return -(-(self.own(p) + 2 * self.beyond()) // self.pos)

    def blocks(self, p: Problem) -> int:
        """Blocks of a launch."""
        return p.batch * self.groups(p) * self.split * p.directions

    def threads(self, p: Problem) -> int:
        """Block size, in whole warps."""
        return -(-self.rows(p) * self.lanes // 32) * 32

    def groups(self, p: Problem) -> int:
        """Blocks along the channels."""
        return -(-p.channels // (self.vec * self.lanes))

    def shared_bytes(self, p: Problem) -> int:
        """Dynamic shared memory of a block: lines of float32 state, then stages of the backward."""
        rows, vectors = self.rows(p), self.lanes * self.vec
        state = (4 if p.backward else 2) * (rows * self.pos + 2) * vectors * 4
        state += 4 * self.beyond() * (3 if p.backward else 1) * vectors * 4  # mailboxes
        if p.backward:
            return state + self.stages * p.maps * rows * self.pos * vectors * p.itemsize
        return state  # the forward's stages are in registers

    def thread_bound(self, p: Problem) -> int:
        """The block size the kernel is compiled for, in few steps so that image sizes share kernels."""
        return next(bound for bound in (128, 256, 384, 512, 640, MAX_THREADS) if self.threads(p) <= bound)

    def fits(self, p: Problem, machine: Machine) -> bool:
        """Whether a block has the threads, registers and shared memory it needs."""
        if self.threads(p) > MAX_THREADS or self.shared_bytes(p) > machine.shared_bytes:
            return False
        if self.split > 1 and self.own(p) < self.halo:
            return False
        work = self.vec * self.pos  # registers grow with it
        if not p.backward and work * p.itemsize * self.stages > 48:
            return False
        return work <= 8 and (self.threads(p) <= 640 or work <= 2)


def _vectors(p: Problem) -> Iterator[int]:
    """Channels a thread may take, widest first: a power of two that the channels and all addresses allow."""
    vec = 16 // p.itemsize
    while vec > 1:
        if p.channels % vec == 0 and p.alignment % (vec * p.itemsize) == 0:
            yield vec
        vec //= 2
    yield 1


def _lanes(p: Problem, vec: int, run: int) -> int:
    """The power of two of vectors that make runs of about `run` bytes, no more than the channels have."""
    lanes = 1
    while lanes * 2 * vec * p.itemsize <= run and lanes * 2 * vec <= p.channels:
        lanes *= 2
    return lanes


def choose(p: Problem, machine: Machine) -> Cut | None:
    """The cut for a problem, or None where the lines are too long for any.

    From sweeps on an H100 (results/operator): runs of 128 bytes as long as there is a block for most processors; where
    there is not, lines are cut over a cluster, which makes blocks without making runs shorter; short lines want narrow
    vectors instead.
    """
    vectors = list(_vectors(p))
    splits = (1, 2, 4, 8) if machine.clusters else (1,)
    enough = machine.processors * 3 // 4

    wide = vectors[0]
    for run in (128, 64, 32):
        lanes = _lanes(p, wide, run)
        stages = (3 if wide * p.itemsize * lanes <= 32 else 2) if p.backward else 1
        cuts = [Cut(wide, lanes, 1, stages, split, _halo_of_long_parts(p, split)) for split in splits]
        first = next((cut for cut in cuts if cut.fits(p, machine) and cut.threads(p) <= 640), None)
        if first is None:
            continue
        # Below a sector the load/store unit works for nothing: rather leave processors idle, if lines are whole.
        least = machine.processors // 3 if run == 32 and first.split == 1 else enough
        if first.blocks(p) >= least:
            # The backward is worth a second block a processor, even so.
            finer = _over_a_cluster(p, machine, wide, lanes) if run == 32 and p.backward else None
            return finer or first
    # Too few blocks: cut finer.
    for run in (32, 8 * p.itemsize) if p.backward else (8 * p.itemsize,):
        vec = next(v for v in vectors if v == 1 or v * p.itemsize <= run // 2)
        fine = _over_a_cluster(p, machine, vec, _lanes(p, vec, run))
        if fine is not None and (run == 8 * p.itemsize or fine.blocks(p) >= machine.processors // 3):
            return fine
    vec = next(v for v in vectors if v <= 2)
    fine = Cut(vec, _lanes(p, vec, 8), 1, 3)
    if fine.fits(p, machine) and fine.threads(p) <= 640:
        return fine
    # Whatever fits.
    for vec in vectors:
        for pos in (1, 2, 4, 8):
            for split in splits:
                for stages in (3, 2) if p.backward else (3, 2, 1):
                    if (cut := Cut(vec, 1, pos, stages, split)).fits(p, machine):
                        return cut
    return None


def _halo_of_long_parts(p: Problem, split: int) -> int:
    """Of parts so long that a halo costs nothing beside a barrier a line. Shorter ones of wide runs: not measured."""
    return 8 if split > 1 and p.longest // split >= 128 else 1


def _over_a_cluster(p: Problem, machine: Machine, vec: int, lanes: int) -> Cut | None:
    """Lines cut over a cluster, into parts of no fewer than 25 positions, while blocks are at most two a processor.

    From the same sweeps: two blocks a line below 100 positions, four above, more only where those do not fit. The
    halo's work is for nothing, and so is a barrier: the more blocks wait for each other the more often, but where
    processors have other blocks to turn to, they wait for free.
    """
    if not machine.clusters or p.longest < 64:
        return None
    for split in (2,) if p.longest < 100 else (4, 2, 8):
        whole = Cut(vec, lanes, 1, 3 if p.backward else 2, split)
        if whole.blocks(p) > 2 * machine.processors:
            continue
        cut = replace(whole, halo=4 if whole.blocks(p) > machine.processors else 32 // split)
        if cut.fits(p, machine) and cut.threads(p) <= 640:
            return cut
    return None
