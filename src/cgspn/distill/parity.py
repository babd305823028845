"""A check before the first step that the teacher's taps match its forward pass."""

import torch
from torch import Tensor

from ..models.encoder import Encoder
from .taps import tapped_forward

FLOAT32, BFLOAT16 = (
    1e-5,
    0.1,
)  # tolerances: order of sums; bfloat16 through tens of blocks


class ParityError(RuntimeError):
    """Raised if the teacher's taps do not match its forward pass; the message gives the error and the tolerance."""


@torch.no_grad()
def check_parity(teacher: Encoder, images: Tensor, precision: str) -> float:
    """Compare the taps of a teacher, in the run's precision, with its plain forward pass in float32.

    teacher: in eval mode. images: [B, channels, H, W], normalised; two are enough. precision: "float32" or "bfloat16".

    Returns the relative error of the final tokens. Raises ParityError if it is too large for the precision, for example
    because of damaged weights or features that overflow.
    """
    plain = teacher(images).tokens.flatten(1, 2)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        tapped = tapped_forward(teacher, images).tokens
    error = float((tapped.double() - plain.double()).norm() / plain.double().norm())
    allowed = BFLOAT16 if precision == "bfloat16" else FLOAT32
    if not error <= allowed:
        raise ParityError(
            f"the teacher's tokens in {precision} differ from its forward pass by {error:.2g}; accepted: {allowed}"
        )
    return error
