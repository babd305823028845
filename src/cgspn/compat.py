"""All private PyTorch names that the project uses, so that a new PyTorch version is checked in one place.

`SUPPORTED` lists the supported versions. A missing name raises an ImportError: when this module is imported if
everything needs the name, otherwise at its first use.
"""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch.nn.modules import module as _module
from torch.utils._device import DeviceContext as DeviceContext  # the mode of torch.set_default_device

SUPPORTED = ("2.9", "2.14")  # the oldest that pyproject.toml allows, and the newest that was tested


@cache
def private(path: str) -> Any:
    """The object of torch at a dotted path. Raises ImportError with the path and the supported versions."""
    found: Any = torch
    for name in path.split("."):
        if not hasattr(found, name) and hasattr(found, "__path__"):
            with suppress(ImportError):
                import_module(f"{found.__name__}.{name}")
        found = getattr(found, name, None)
        if found is None:
            raise ImportError(
                f"torch.{path} does not exist in torch {torch.__version__}; cgspn supports torch {SUPPORTED[0]} to "
                f"{SUPPORTED[1]}: install one of these, or a newer cgspn"
            )
    return found


# Operations on lists of tensors in one launch, documented under these names.
foreach_add_ = private("_foreach_add_")
foreach_copy_ = private("_foreach_copy_")
foreach_lerp = private("_foreach_lerp")
foreach_lerp_ = private("_foreach_lerp_")
foreach_mul_ = private("_foreach_mul_")

# A linear layer with its GELU in the epilogue of cuBLAS.
addmm_activation = private("_addmm_activation")

# Everything that intercepts operations: modes, tracers, transforms, forward-mode AD.
dispatch_modes = private("_C._len_torch_dispatch_stack")
function_modes = private("_C._len_torch_function_stack")
function_mode_at = private("_C._get_function_stack_at")
tracing_state = private("_C._get_tracing_state")

# A module's `__dict__` has its hooks under these names, and the result of `Module.compile` under the last one.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
COMPILED_CALL = "_compiled_call_impl"
has_any_global_hook: Callable[[], bool] = _module._has_any_global_hook

# These exist only in builds of torch with CUDA.
current_raw_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
current_device: Any = getattr(torch._C, "_cuda_getDevice", None)
is_capturing: Any = getattr(torch._C, "_cuda_isCurrentStreamCapturing", None)


def is_tracing() -> bool:
    """Whether torch.jit.trace is recording."""
    return not torch.compiler.is_compiling() and torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def in_transform() -> bool:
    """Whether the caller is under vmap, grad, jvp or another transform of `torch.func`."""
    # Test the type, because a tracer treats `is not None` as true.
    return isinstance(torch._C._functorch.peek_interpreter_stack(), torch._C._functorch.CInterpreter)


def in_forward_ad() -> bool:
    """Whether the caller runs in forward-mode AD."""
    return torch.autograd.forward_ad._current_level >= 0


def recompile_limit(count: int) -> AbstractContextManager[Any]:
    """Let torch.compile keep up to `count` graphs per function within the context."""
    limit: AbstractContextManager[Any] = private("_dynamo.config").patch(recompile_limit=count)
    return limit


def cpp_compiler() -> str | None:
    """The path of the C++ compiler that AOTInductor would use, or None without one."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return shutil.which(get_cpp_compiler())
    except InvalidCxxCompiler:
        return None
