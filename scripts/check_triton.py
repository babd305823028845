"""Compile the Triton scans, what stands around them and the losses of taps for every architecture, without a GPU.

    pip install triton && python scripts/check_triton.py

Prints one line per kernel, architecture and dtype; one that does not compile raises, and a fused piece that wants too
much shared memory or more registers than there are.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cgspn.distill import losses_triton as losses
from cgspn.ops.fused import kernels as fused
from cgspn.ops.fused import row_kernels as over_rows
from cgspn.ops.fused.rows import TILES
from cgspn.ops.triton_kernels import scan_backward, scan_forward
from cgspn.ops.triton_scan import tile

ARCHITECTURES = (80, 90, 100)
SIZES = ("H", "W", "C", "D", "groups", "codes", "chunk")
MAPS = ("x", "lam", "u", "logits", "keep", "dkeep", "y", "dy", "dx", "dlam", "du", "dlogits")
STATES = ("saved", "h", "counted", "n")  # in the dtype of the state
FORWARD = {"NORMALISE": True, "KEEP": True, "MASKED": True, "MEAN": True, "WRITE": True, "SAVE": True}
BACKWARD = {"NORMALISE": True, "KEEP": True, "MASKED": True, "MEAN": True}

SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block may have
# kernels around the scan: tiles, warps, stages, as library.py launches them for bf16 tokens of 1152 channels
TOKENS = ("x", "out", "dout", "dx", "dy_", "residual", "y", "normal", "folded", "past", "scaled", "dn", "dy", "unit")
TOKENS += ("branch", "total", "dnormal", "d", "hidden", "student", "teacher")
Piece = tuple[Any, dict[str, Any], int, int]
TILE = {"ROWS": 128, "LATENT": 256, "CHANNELS": 64, "STAGES": 3, "NORM": True, "EVEN": True}
LARGE: Piece = (fused.linear_residual_forward, TILE, 8, 3)  # more shared memory than an sm_80 has
ROW = {"ROWS": 128, "LATENT": 256, "CHANNELS": 64, "EVEN": True, "SAVE": True}
WIDE: Piece = (fused.norm_linear_forward, ROW, 8, 4)
MORE: dict[int, list[Piece]] = {80: [], 90: [LARGE, WIDE], 100: [LARGE]}
LOCAL = {"SIDE": 3, "BIAS": True, "NORM": True, "MASKED": True, "FLIP": False}
FUSED: list[Piece] = [
    (fused.norm_linear_fold, {"CHANNELS": 2048}, 4, 3),
    *(
        (
            fused.norm_linear_forward,
            {"ROWS": rows, "LATENT": latent, "CHANNELS": channels, "EVEN": even, "SAVE": even},
            warps,
            4,
        )
        for rows, latent, channels, warps in ((64, 64, 64, 4), (16, 64, 64, 4), (64, 256, 32, 8), (32, 512, 16, 8))
        for even in (True, False)
    ),
    *(
        (fused.norm_linear_backward, sizes | {"STAGES": 2, "EVEN": True, "PAST": past}, 4, 3)
        for sizes in ({"ROWS": 64, "LATENT": 64, "CHANNELS": 64}, {"ROWS": 16, "LATENT": 512, "CHANNELS": 16})
        for past in (True, False)
    ),
    (fused.norm_linear_finish, {"CHANNELS": 32, "LATENT": 32}, 4, 3),
    (fused.linear_residual_finish, {"CHANNELS": 64, "LATENT": 16}, 4, 3),
    (fused.linear_residual_fold, {"CHANNELS": 16, "LATENT": 512, "NORM": True, "SCALE": True, "NEXT": True}, 4, 3),
    *(
        (fused.linear_residual_forward, sizes | {"NORM": True, "EVEN": even}, warps, 3)
        for sizes, warps in (
            ({"ROWS": 64, "LATENT": 256, "CHANNELS": 64, "STAGES": 2}, 4),
            ({"ROWS": 64, "LATENT": 512, "CHANNELS": 32, "STAGES": 2}, 4),
        )
        for even in (True, False)
    ),
    (fused.layer_norm_forward, {"ROWS": 2, "CHANNELS": 2048}, 4, 3),
    *((fused.rms_forward, {"ROWS": 4096 // wide, "LATENT": wide}, 4, 3) for wide in (64, 512, 4096)),
    (fused.rms_backward, {"ROWS": 32, "LATENT": 256, "GAIN": False}, 8, 3),
    *((fused.rms_backward, {"ROWS": rows, "LATENT": 8192 // rows, "GAIN": True}, 8, 3) for rows in (64, 32, 2)),
    *(
        (fused.local_norm_forward, tile | LOCAL, 2, 3)
        for tile in ({"COLUMNS": 16, "CHANNELS": 64}, {"COLUMNS": 4, "CHANNELS": 256}, {"COLUMNS": 2, "CHANNELS": 512})
    ),
    *(
        (over_rows.add_norm_forward, row | {"BRANCH": added, "KEEP": added, "AFTER": added, "SAVE": not added}, 4, 3)
        for row in ({"ROWS": 4, "CHANNELS": 2048}, {"ROWS": 2, "CHANNELS": 4096})
        for added in (True, False)
    ),
    *(
        (over_rows.norm_backward, {"ROWS": 1, "CHANNELS": wide, "STAGES": 3, "PAST": past}, 4, 3)
        for wide in (2048, 4096)
        for past in (True, False)
    ),
    *(
        (over_rows.column_sums, {"ROWS": size // wide, "CHANNELS": wide, "STAGES": stages, "GELU": mode}, warps, 3)
        for mode, (widths, size, warps, stages, _) in enumerate(TILES.values())
        for wide in widths
    ),
    *((over_rows.gelu, {"BLOCK": 4096, "GELU": mode}, 8, 3) for mode in (1, 2)),
    (over_rows.add_up, {"CHANNELS": 64, "STEP": 32}, 4, 3),
    *(
        (kernel, {"ROWS": 1, "HEAD": 1024, "TAIL": tail, "KL": kl}, 1, 3)
        for kernel in (losses.tap_loss_forward, losses.tap_loss_backward)
        for tail in (128, 0)
        for kl in (True, False)
    ),
    (fused.local_kernel_gradient, {"COLUMNS": 16, "CHANNELS": 64, "SIDE": 3, "TAPS": 4, "MASKED": True}, 4, 3),
]


def fused_piece(kernel: Any, constants: dict[str, Any], warps: int, stages: int, architecture: int) -> Any:
    """A kernel of `cgspn.ops.fused` for bf16 tokens, with what a launch tells of its arguments."""
    names = kernel.arg_names
    if "WAIT" in names:
        constants = constants | {"WAIT": architecture == 90}
    numbers = {"rows": "i32", "C": "i32", "K": "i32", "H": "i32", "W": "i32", "images": "i32"}
    numbers |= {"eps": "fp32", "normal_eps": "fp32", "mask": "*u8", "share": "i32", "N": "i32", "kl_weight": "fp32"}
    numbers |= {"count": "i32", "stride": "i32"}
    numbers |= dict.fromkeys(("s_image", "s_row", "t_image", "t_row"), "i32")
    signature = {
        name: "constexpr" if name in constants else numbers.get(name, "*bf16" if name in TOKENS else "*fp32")
        for name in names
    }
    aligned = [name for name in names if signature[name].startswith("*") or name in ("C", "K", "share")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": warps, "num_stages": stages}
    found = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    if found.metadata.shared > SHARED[architecture]:
        raise SystemExit(f"{kernel.fn.__name__} wants {found.metadata.shared} bytes of shared memory: {constants}")
    if spilled(found) > 16:  # an address or two
        raise SystemExit(f"{kernel.fn.__name__} keeps {spilled(found)} bytes of a thread in memory: {constants}")
    return found


def spilled(found: Any) -> int:
    """Bytes of a thread's stack: registers that a kernel wanted and did not get."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    stack = re.search(r"STACK:(\d+)", usage)
    return int(stack.group(1)) if stack else 0


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
        for kernel, constants, warps, stages in [*FUSED, *MORE[architecture]]:
            shared = fused_piece(kernel, constants, warps, stages, architecture).metadata.shared
            print(f"sm_{architecture} {kernel.fn.__name__} bf16: {shared} bytes of shared memory")


if __name__ == "__main__":
    main()
