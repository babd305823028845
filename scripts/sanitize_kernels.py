r"""What compute-sanitizer runs: every CUDA kernel on small, awkward shapes, with and without a mask, on forced cuts.

    compute-sanitizer --tool memcheck --kernel-name kns=scan --kernel-name kns=projected \
      python scripts/sanitize_kernels.py

and the same with racecheck and synccheck; initcheck without the kernel filter.
"""

from __future__ import annotations

import torch

from cgspn.ops.arguments import ProjectedScan, Scan
from cgspn.ops.cuda import launch, projected, scan
from cgspn.ops.cuda.plan import TileConfig
from cgspn.ops.cuda.projected_plan import ProjectedTileConfig

FOUR = [0, 1, 2, 3]


def main() -> None:
    """Run forward and backward; what is wrong is the sanitizer's to say."""
    choose = launch.choose
    for b, h, w, c in ((2, 9, 13, 16), (1, 21, 18, 21)):
        shapes = [(b, h, w, c), (b, h, w, 4, 3, c), (b, h, w, 4, c), (b, h, w, 4, c)]
        tensors = [torch.randn(s, device="cuda").bfloat16() for s in shapes]
        mask = torch.rand(b, h, w, device="cuda") < 0.8
        # The plan's own cut, and lines over clusters of four and of two blocks.
        for cut in (None, TileConfig(1 if c % 8 else 8, 1, 2, 4), TileConfig(1 if c % 2 else 2, 2, 2, 2, halo=3)):
            launch.prepare.cache_clear()
            if cut is not None:
                launch.choose = lambda p, m, cut=cut: cut  # type: ignore[misc]
            for inside in (None, mask):
                for mean in (False, True):
                    arguments = Scan(*tensors, mask=inside, normalise_state=mean)
                    y, *saved = scan.forward_saving(arguments)
                    scan.backward(y, arguments, *saved)
            launch.choose = choose
    for b, h, w, c in ((2, 9, 13, 24), (1, 21, 18, 64), (1, 11, 19, 40)):
        x, weight = (torch.randn(s, device="cuda").bfloat16() for s in ((b, h, w, c), (20 * c, c)))
        # The plan's own cut for few blocks; and that for many, some of whose warps have no channels.
        cut = None if c != 40 else ProjectedTileConfig(2, 1, 3)
        for inside in (None, torch.rand(b, h, w, device="cuda") < 0.8):
            for merge in (True, False):
                p = ProjectedScan(x, weight, weight[:, 0], inside, FOUR, merge)
                projected.forward(p, cut)
    torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main()
