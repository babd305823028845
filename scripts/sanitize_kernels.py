r"""What compute-sanitizer runs: every CUDA kernel on small, awkward shapes, with and without a mask, on forced cuts.

    compute-sanitizer --tool memcheck --kernel-name kns=scan --kernel-name kns=projected \
      python scripts/sanitize_kernels.py

and the same with racecheck and synccheck; initcheck without the kernel filter.
"""

from __future__ import annotations

import torch

from cgspn.ops.cuda import launch, projected, scan
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
        for cut in (None, Cut(1 if c % 8 else 8, 1, 1, 2, 4), Cut(1 if c % 2 else 2, 2, 2, 2, 2, halo=3)):
            launch.prepare.cache_clear()
            if cut is not None:
                launch.choose = lambda p, m, cut=cut: cut  # type: ignore[misc]
            for inside in (None, mask):
                y, state = scan.forward_saving(*tensors, inside, FOUR, True)
                scan.backward_saved(y, *tensors, inside, FOUR, True, state)
            launch.choose = choose
        turns = Cut(1 if c % 4 else 4, 2, 1, 2, turns=True)
        for inside in (None, mask):
            scan.forward(*tensors, inside, FOUR, True, cut=turns)
    for b, h, w, c in ((2, 9, 13, 24), (1, 21, 18, 136)):
        x, weight = (torch.randn(s, device="cuda").bfloat16() for s in ((b, h, w, c), (20 * c, c)))
        for inside in (None, torch.rand(b, h, w, device="cuda") < 0.8):
            for merge in (True, False):
                y = projected.forward(x, weight, weight[:, 0], inside, FOUR, merge)
                projected.backward(y, x, weight, weight[:, 0], inside, FOUR, merge)
    torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main()
