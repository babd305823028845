"""Compile the Triton scans for every supported architecture, without a GPU.

    pip install triton && python scripts/check_triton.py

Prints one line per kernel, architecture and dtype; a kernel that does not compile raises.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cgspn.ops.triton_kernels import scan_backward, scan_forward
from cgspn.ops.triton_scan import tile

ARCHITECTURES = (80, 90, 100)
SIZES = ("H", "W", "C", "D", "groups", "codes", "chunk")
MAPS = ("x", "lam", "u", "logits", "y", "dy", "dx", "dlam", "du", "dlogits")
STATES = ("saved", "h")  # in the dtype of the state
FORWARD = {"NORMALISE": True, "MASKED": True, "WRITE": True, "SAVE": True}
BACKWARD = {"NORMALISE": True, "MASKED": True}


def compiled(kernel: Any, flags: dict[str, bool], architecture: int, dtype: str, longest: int, channels: int) -> Any:
    """A kernel as triton_scan.py launches it for lines of `longest` positions."""
    positions, wide, warps = tile(longest, channels, kernel is scan_backward)
    state = "fp64" if dtype == "fp64" else "fp32"
    constants: dict[str, Any] = flags | {"POSITIONS": positions, "CHANNELS": wide}
    constants["STATE"] = tl.float64 if dtype == "fp64" else tl.float32

    def kind(name: str) -> Any:
        if name in constants:
            return "constexpr"
        if name in MAPS:
            return f"*{dtype}"
        if name in STATES:
            return f"*{state}"
        return "*u8" if name == "mask" else "i32" if name in SIZES else ("i32",) * 6  # the rest are strides

    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: kind(name) for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})


def main() -> None:
    """Compile and print."""
    for architecture in ARCHITECTURES:
        for dtype in ("bf16", "fp32") if architecture == 90 else ("bf16",):
            for kernel, flags in ((scan_forward, FORWARD), (scan_backward, BACKWARD)):
                for longest in (74, 147):
                    size = len(compiled(kernel, flags, architecture, dtype, longest, 64).asm["cubin"])
                    print(f"sm_{architecture} {kernel.fn.__name__} {dtype}, lines of {longest}: {size} bytes")


if __name__ == "__main__":
    main()
