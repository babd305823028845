"""How a scan is cut into blocks: channels a thread, vectors and positions a block, lines in flight.

A block walks one direction of one image for `lanes` vectors of `vec` channels. Wide vectors and many lanes read
memory in long runs; few of them make more blocks, which a small batch needs to fill the machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

MAX_THREADS = 1024
LONGEST_LINE = 4096  # above this the PyTorch backend scans


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
    def maps(self) -> int:
        """Input maps that pass through shared memory."""
        return 5 + self.normalise + 2 * self.backward


@dataclass(frozen=True)
class Cut:
    """One way to cut: `vec` channels and `pos` positions a thread, `lanes` vectors a block, `stages` lines."""

    vec: int
    lanes: int
    pos: int
    stages: int

    def rows(self, p: Problem) -> int:
        """Positions a block handles at once."""
        return -(-p.longest // self.pos)

    def threads(self, p: Problem) -> int:
        """Block size, in whole warps."""
        return -(-self.rows(p) * self.lanes // 32) * 32

    def groups(self, p: Problem) -> int:
        """Blocks along the channels."""
        return -(-p.channels // (self.vec * self.lanes))

    def shared_bytes(self, p: Problem) -> int:
        """Dynamic shared memory of a block: lines of float32 state, then the stages."""
        rows = self.rows(p)
        state = (4 if p.backward else 2) * (rows * self.pos + 2) * self.lanes * self.vec * 4
        return state + self.stages * p.maps * rows * self.pos * self.lanes * self.vec * p.itemsize

    def thread_bound(self, p: Problem) -> int:
        """The block size the kernel is compiled for, in few steps so that image sizes share kernels."""
        return next(bound for bound in (256, 512, MAX_THREADS) if self.threads(p) <= bound)

    def fits(self, p: Problem, machine: Machine) -> bool:
        """Whether a block has the threads, registers and shared memory it needs."""
        if self.threads(p) > MAX_THREADS or self.shared_bytes(p) > machine.shared_bytes:
            return False
        work = self.vec * self.pos  # registers grow with it
        return work <= 8 and (self.threads(p) <= 512 or work <= (2 if p.backward else 4))


def _vectors(p: Problem) -> Iterator[int]:
    """Channels a thread may take, widest first: a power of two that the channels and all addresses allow."""
    vec = 16 // p.itemsize
    while vec > 1:
        if p.channels % vec == 0 and p.alignment % (vec * p.itemsize) == 0:
            yield vec
        vec //= 2
    yield 1


def choose(p: Problem, machine: Machine) -> Cut | None:
    """The cut for a problem, or None where the lines are too long for any.

    Wide vectors, and as many lanes as leave a block for every processor.
    """
    stages = 3
    for vec in _vectors(p):
        pos = 1
        while pos * vec <= 8:
            fitting = [
                cut
                for lanes in (16, 8, 4, 2, 1)
                if (cut := Cut(vec, lanes, pos, stages)).fits(p, machine)
                and cut.threads(p) <= 640
                and (lanes == 1 or lanes * vec <= p.channels)
            ] or [cut for s in (3, 2) if (cut := Cut(vec, 1, pos, s)).fits(p, machine)]
            filling = [c for c in fitting if p.batch * p.directions * c.groups(p) >= machine.processors * 3 // 4]
            if fitting:
                return (filling or fitting[-1:])[0]
            pos *= 2
    return None
