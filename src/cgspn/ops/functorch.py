"""torch.func's transforms and forward-mode derivatives, which custom ops do not know: they would give no tangent."""

from __future__ import annotations

from ..compat import in_forward_ad, in_transform


def in_functorch() -> bool:
    """Whether the caller is under vmap, grad, jvp or another transform, or in a level of forward-mode AD."""
    # Transforms before the level, which a traced jvp enters and leaves before the tracer's guards look at it.
    return in_transform() or in_forward_ad()


def check_plain(backend: str) -> None:
    """Raise RuntimeError if a backend was asked for that cannot run under a transform."""
    if backend not in ("auto", "torch"):
        raise RuntimeError(
            f"backend {backend!r} cannot run here: under torch.func and forward-mode AD the reference does; "
            "accepted: 'auto', 'torch'"
        )


def check_reverse(name: str) -> None:
    """Raise RuntimeError in a level of forward-mode AD: for the ops themselves, as an exported program holds them."""
    if in_forward_ad():
        raise RuntimeError(
            f"{name} has no forward-mode derivative as an op of a program; use torch.autograd.grad, or transform "
            f"cgspn.ops.{name} before it is exported"
        )
