"""Compile every kernel for every supported architecture, without a GPU, and fail on spills or too many registers.

Needs cuda-core with NVRTC: pip install '.[cuda]'. Prints one line per kernel and architecture.
"""

from __future__ import annotations

import itertools
import re
import sys

from cgspn.ops.cuda.compile import compile_cubin, macros
from cgspn.ops.cuda.launch import merge_defines
from cgspn.ops.cuda.plan import Machine, Problem, choose

ARCHITECTURES = {"sm_80": Machine(108, 163 * 1024, False), "sm_90": Machine(132, 227 * 1024, True)}
ARCHITECTURES["sm_100"] = Machine(148, 227 * 1024, True)
REGISTERS = 65536  # of a processor
# Bytes that a kernel may spill: the wide backward holds more than the 96 registers of a 640-thread block, and spilling
# some was measured faster than narrower vectors (results/operator).
SPILLS = {"forward": 160, "backward": 400, "merge": 0}
SHAPES = [(1, 74, 64), (1, 147, 64), (1, 294, 64), (8, 74, 64), (32, 74, 64), (32, 147, 64), (2, 40, 21), (1, 1024, 64)]


def variants(machine: Machine) -> list[tuple[str, dict[str, int]]]:
    """The kernels that the plan asks for at sizes people use, and line_scan's published one."""
    import torch

    found = [("merge", dict(merge_defines(dtype, vec))) for dtype, vec in ((torch.bfloat16, 8), (torch.float32, 4))]
    cases = [(*shape, 1, code, bw) for shape, code, bw in itertools.product(SHAPES, (0, 2), (False, True))]
    cases += [(16, 1024, 8, 0, 0, bw) for bw in (False, True)]
    for b, n, c, normalise, code, backward in cases:
        size = 4 if code == 0 else 2
        p = Problem(backward, bool(normalise), size, b, c, 4 if normalise else 1, n, 16 if c % 8 == 0 else size)
        cut = choose(p, machine)
        if cut is None:
            continue
        narrow = int(cut.lanes * cut.vec * size < 32 and cut.groups(p) > 1)
        defines = {"DTYPE": code, "VEC": cut.vec, "POS": cut.pos, "STAGES": cut.stages, "SPLIT": cut.split}
        defines |= {"THREADS": cut.thread_bound(p), "NORMALISE": normalise, "MASKED": 1, "MERGE": normalise}
        defines |= {"NARROW": narrow} | ({} if backward else {"SAVE": 1})
        found.append(("backward" if backward else "forward", defines))
    return list({(name, macros(defines)): (name, defines) for name, defines in found}.values())


def main() -> int:
    """Compile, print, and return the number of kernels over a limit."""
    failures = 0
    for arch, machine in ARCHITECTURES.items():
        for name, defines in variants(machine):
            _, report = compile_cubin(name, macros(defines), arch)
            spilled = sum(map(int, re.findall(r"(\d+) bytes spill stores", report)))
            registers = max(map(int, re.findall(r"Used (\d+) registers", report)))
            bad = spilled > SPILLS[name] or registers * defines["THREADS"] > REGISTERS
            failures += bad
            short = " ".join(f"{key}={value}" for key, value in defines.items())
            print(f"{arch} {name}: {registers} registers, {spilled} bytes spilled, {short}{' TOO MANY' if bad else ''}")
    return failures


if __name__ == "__main__":
    sys.exit(min(main(), 1))
