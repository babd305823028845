"""Compile every kernel for every supported architecture, without a GPU, and fail on spills or too many registers.

    pip install '.[cuda]' && python scripts/check_kernels.py

Prints one line per kernel and architecture.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from cgspn.ops.cuda.compile import compile_cubin, macros
from cgspn.ops.cuda.launch import merge_defines, scan_defines
from cgspn.ops.cuda.plan import Problem, choose
from cgspn.ops.cuda.projected import projected_defines
from cgspn.ops.cuda.projected_plan import choose as choose_projected
from cgspn.ops.gpu import Machine

ARCHITECTURES = {"sm_80": Machine(108, 163 * 1024, False), "sm_90": Machine(132, 227 * 1024, True)}
ARCHITECTURES["sm_100"] = Machine(148, 227 * 1024, True)
REGISTERS = 65536  # of an SM
# Bytes that a kernel may spill: the wide backward holds more than the 96 registers of a 640-thread block, and spilling
# some was measured faster than narrower vectors (results/operator).
SPILLS = {"forward": 160, "backward": 400}
# A few bytes outside the loop over lines, at 168 registers: 10 warps a block are worth more than what that costs.
SPILLS |= {"projected_forward": 40}
SHAPES = [(1, 74, 64), (1, 147, 64), (1, 294, 64), (8, 74, 64), (32, 74, 64), (32, 147, 64), (2, 40, 21), (1, 1024, 64)]
PROJECTED = [(1, 74, 64), (32, 74, 64), (32, 147, 64), (8, 37, 24)]
# batch, grid, channels of a direction: eight have one set of parameters between them
SETS = [(1, 74, 64), (32, 74, 64), (32, 74, 96), (32, 147, 96), (1, 294, 96)]
Variant = tuple[str, dict[str, int]]


def scans(machine: Machine) -> Iterator[Variant]:
    """The scans that the plan asks for at sizes people use, and line_scan's published one."""
    cases = [(*shape, 1, code, bw) for shape, code, bw in itertools.product(SHAPES, (0, 2), (False, True))]
    cases += [(16, 1024, 8, 0, 0, bw) for bw in (False, True)]
    for b, n, c, normalise, code, backward in cases:
        size = 4 if code == 0 else 2
        p = Problem(backward, bool(normalise), size, b, c, 4 if normalise else 1, n, 16 if c % 8 == 0 else size)
        if cut := choose(p, machine):
            save = None if backward else True
            yield p.name, scan_defines(cut, p, code, masked=True, merged=bool(normalise), save=save)


def sets(machine: Machine) -> Iterator[Variant]:
    """Scans whose channels share parameters, with a forget gate, that the plan asks for; also normalised."""
    for (b, n, c), backward, mean in itertools.product(SETS, (False, True), (False, True)):
        p = Problem(backward, True, 2, b, c, 4, n, 16, share=8, keep=True, mean=mean)
        if cut := choose(p, machine):
            save = None if backward else True
            yield p.name, scan_defines(cut, p, 2, masked=True, merged=False, save=save)


def projected(machine: Machine) -> Iterator[Variant]:
    """The projected scans that the plan asks for."""
    for b, n, c in PROJECTED:
        if cut := choose_projected(b, n, c, 4, machine):
            for masked in (False, True):
                yield "projected_forward", projected_defines(cut, c, 2, masked=masked)


def variants(machine: Machine) -> list[Variant]:
    """Every kernel with its macros, each once."""
    import torch

    found = [("merge", dict(merge_defines(dtype, vec))) for dtype, vec in ((torch.bfloat16, 8), (torch.float32, 4))]
    found += [*scans(machine), *sets(machine), *projected(machine)]
    return list({(name, macros(defines)): (name, defines) for name, defines in found}.values())


def main() -> int:
    """Compile, print, and return the number of kernels over a limit."""
    failures = 0
    for arch, machine in ARCHITECTURES.items():
        found = variants(machine)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            reports = list(pool.map(lambda kernel: compile_cubin(kernel[0], macros(kernel[1]), arch)[1], found))  # noqa: B023
        for (name, defines), report in zip(found, reports, strict=True):
            spilled = sum(map(int, re.findall(r"(\d+) bytes spill stores", report)))
            registers = max(map(int, re.findall(r"Used (\d+) registers", report)))
            bad = spilled > SPILLS.get(name, 0) or registers * defines["THREADS"] > REGISTERS
            failures += bad
            short = " ".join(f"{key}={value}" for key, value in defines.items())
            print(f"{arch} {name}: {registers} registers, {spilled} bytes spilled, {short}{' TOO MANY' if bad else ''}")
    return failures


if __name__ == "__main__":
    sys.exit(min(main(), 1))
