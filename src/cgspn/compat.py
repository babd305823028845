"""Every private name of PyTorch that the project uses, so that a new version of PyTorch is checked in one place.

Checked with the versions of `CHECKED`. A name that has a public equivalent falls back to it where it is missing. A name
that has none is looked up when it is used, and its absence is an ImportError that says so (`private`).
"""

from __future__ import annotations

import shutil
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.functional import gelu, linear

CHECKED = ("2.9", "2.14")  # the oldest that pyproject.toml allows, and the newest that the project has run with

# Fused updates of lists of tensors. The names are private by their underscore alone: torch documents them.
foreach_add_ = torch._foreach_add_
foreach_copy_ = torch._foreach_copy_
foreach_lerp = torch._foreach_lerp
foreach_lerp_ = torch._foreach_lerp_
foreach_mul_ = torch._foreach_mul_


@cache
def private(path: str) -> Any:
    """The object of torch at a dotted path, as "_C._functorch.CInterpreter".

    Raises ImportError that names the path, the version of torch and the versions that have it.
    """
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
        if found is None:
            raise ImportError(
                f"torch.{path} does not exist in torch {torch.__version__}; cgspn was checked with torch "
                f"{CHECKED[0]} to {CHECKED[1]}: install one of these, or a newer cgspn"
            )
    return found


def is_tracing() -> bool:
    """Whether torch.jit.trace records what runs."""
    return not torch.compiler.is_compiling() and torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def in_functorch() -> bool:
    """Whether the caller is under vmap, grad, jvp or another transform of `torch.func`."""
    # Of a type rather than not None, which a tracer takes for true.
    return isinstance(torch._C._functorch.peek_interpreter_stack(), torch._C._functorch.CInterpreter)


def in_forward_ad() -> bool:
    """Whether a level of forward-mode differentiation is entered."""
    return forward_ad._current_level >= 0


def has_hooks(*modules: nn.Module) -> bool:
    """Whether any of the modules has a forward or backward hook, whose work no other function may do for it."""
    return any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        for module in modules
    )


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU (tanh) of a linear layer, [M, C] -> [M, K]: one launch on CUDA, where cuBLAS has the epilogue for it."""
    fused = getattr(torch, "_addmm_activation", None) if x.is_cuda else None
    if fused is None:
        return gelu(linear(x, weight, bias), approximate="tanh")
    out: Tensor = fused(bias, x, weight.T, use_gelu=True)
    return out


def scaled_mm(x: Tensor, weight: Tensor, scales: Tensor, weight_scales: Tensor, bias: Tensor | None) -> Tensor:
    """float8 x [M, K] times weight [N, K] transposed, with scales of rows [M, 1] and [N, 1]: bfloat16 [M, N].

    Raises ImportError where torch has no such product.
    """
    out: Tensor = private("_scaled_mm")(
        x,
        weight.T,
        scale_a=scales,
        scale_b=weight_scales.T,
        bias=None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,  # the one dtype that every version scales rows into
        use_fast_accum=True,
    )
    return out


def cpp_compiler() -> str | None:
    """The path of the C++ compiler that AOTInductor would use, or None without one."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return shutil.which(get_cpp_compiler())
    except InvalidCxxCompiler:
        return None


def aoti_package(program: torch.export.ExportedProgram, path: str) -> None:
    """Compile an exported program with AOTInductor into a file (.pt2). Needs a C++ compiler."""
    private("_inductor.aoti_compile_and_package")(program, package_path=path)


def aoti_load(path: str) -> Any:
    """Load what `aoti_package` wrote: a callable of tensors. Raises what torch raises for a damaged file."""
    return private("_inductor.aoti_load_package")(path)
