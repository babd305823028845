"""torch.func's transforms and forward-mode derivatives, which custom ops do not know: they would give no tangent."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether the caller is under vmap, grad, jvp or another transform, or in a level of forward-mode AD."""
    if torch.compiler.is_compiling():  # what is traced is transformed by the tracer, which knows the ops
        return False
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def check_plain(backend: str) -> None:
    """Raise RuntimeError if a backend was asked for that cannot run under a transform."""
    if backend not in ("auto", "torch"):
        raise RuntimeError(
            f"backend {backend!r} cannot run here: under torch.func and forward-mode AD the reference does; "
            "accepted: 'auto'"
        )
