"""Detection of torch.func transforms and forward-mode AD, under which custom ops would lose the tangent."""

from __future__ import annotations

from ..compat import in_forward_ad, in_transform


def in_functorch() -> bool:
    """Whether the caller runs under vmap, grad, jvp or another transform, or in forward-mode AD."""
    # Transforms first: a traced jvp enters and leaves its level before the tracer's guards run.
    return in_transform() or in_forward_ad()


def check_plain(backend: str) -> None:
    """Raise RuntimeError if the requested backend cannot run under a transform."""
    if backend not in ("auto", "torch"):
        raise RuntimeError(
            f"backend {backend!r} cannot run here: under torch.func and forward-mode AD the reference does; "
            "accepted: 'auto', 'torch'"
        )


def check_reverse(name: str) -> None:
    """Raise RuntimeError in forward-mode AD. Called by the ops themselves, for exported programs that contain them."""
    if in_forward_ad():
        raise RuntimeError(
            f"{name} has no forward-mode derivative in an exported program; use torch.autograd.grad, or transform "
            f"cgspn.ops.{name} before it is exported"
        )
