"""Checks that a module is plain: of an exact class, unmodified and without hooks, so that a kernel may replace it."""

from __future__ import annotations

from torch import Tensor, nn

from ..compat import COMPILED_CALL, HOOKS, has_any_global_hook

PARAMETERS = (nn.Parameter, Tensor)


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether calling `module` only runs the `forward` of one of `kinds` on ordinary parameters.

    False for wrappers (LoRA, checkpointing, FSDP1), subclasses (parametrizations, FSDP2), hooks of any kind (pruning,
    offloading, FSDP2), a `forward` or a compiled call set on the instance, and parameters of a subclass of Tensor.
    """
    return type(module) in kinds and has_no_hooks(module)


def has_no_hooks(module: nn.Module) -> bool:
    """`is_plain` for a module of any class."""
    state = module.__dict__
    if any([state[hooks] for hooks in HOOKS]) or "forward" in state:  # noqa: C419 (faster)
        return False
    if state.get(COMPILED_CALL) is not None:
        return False
    parameters = state["_parameters"].values()
    return not any([p is not None and type(p) not in PARAMETERS for p in parameters])  # noqa: C419 (faster)


def has_global_hooks() -> bool:
    """Whether global module hooks are set."""
    found: bool = has_any_global_hook()
    return found
