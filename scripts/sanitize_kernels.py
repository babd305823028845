"""What compute-sanitizer runs: every CUDA kernel on small, awkward shapes, with and without a mask, on forced cuts.

    compute-sanitizer --tool memcheck --kernel-name kns=scan python scripts/sanitize_kernels.py

and the same with racecheck and synccheck; initcheck without the kernel filter.
"""

from __future__ import annotations

import torch

from cgspn.ops.cuda import launch, scan
from cgspn.ops.cuda.plan import Cut

FOUR = [0, 1, 2, 3]


def main() -> None:
    """Run forward and backward; what is wrong is the sanitizer's to say."""
    choose = launch.choose
    for b, h, w, c in ((2, 9, 13, 16), (1, 21, 18, 21)):
        shapes = [(b, h, w, c), (b, h, w, 4, 3, c), (b, h, w, 4, c), (b, h, w, 4, c)]
        tensors = [torch.randn(s, device="cuda").bfloat16() for s in shapes]
        mask = torch.rand(b, h, w, device="cuda") < 0.8
        # The plan's own cut, lines over a cluster of four blocks, and two positions a thread over a cluster of two.
        for cut in (None, Cut(1 if c % 8 else 8, 1, 1, 2, 4), Cut(1 if c % 2 else 2, 2, 2, 2, 2)):
            launch.prepare.cache_clear()
            if cut is not None:
                launch.choose = lambda p, m, cut=cut: cut  # type: ignore[misc]
            for inside in (None, mask):
                y, state = scan.forward_saving(*tensors, inside, FOUR, True)
                scan.backward_saved(y, *tensors, inside, FOUR, True, state)
            launch.choose = choose
    torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main()
