"""Which modules another function may stand for: those of an exact kind, unchanged and without hooks."""

from __future__ import annotations

from torch import Tensor, nn

from ..compat import COMPILED_CALL, HOOKS, has_any_global_hook

PARAMETERS = (nn.Parameter, Tensor)


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether calling `module` does nothing but run the `forward` of one of `kinds` on ordinary parameters.

    False for wrappers (LoRA, checkpointing, FSDP1), subclasses (parametrizations, FSDP2), hooks of any kind (pruning,
    offloading, FSDP2), a `forward` or a compiled call set on the instance, and parameters of a subclass of Tensor.
    """
    return type(module) in kinds and has_no_hooks(module)


def has_no_hooks(module: nn.Module) -> bool:
    """As `is_plain`, of a module of any kind."""
    state = module.__dict__
    if any([state[hooks] for hooks in HOOKS]) or "forward" in state:  # noqa: C419 (faster)
        return False
    if state.get(COMPILED_CALL) is not None:
        return False
    parameters = state["_parameters"].values()
    return not any([p is not None and type(p) not in PARAMETERS for p in parameters])  # noqa: C419 (faster)


def has_global_hooks() -> bool:
    """Whether hooks are set that every module calls."""
    found: bool = has_any_global_hook()
    return found
