"""What is measured of a student at each size."""

from __future__ import annotations

import torch
from torch import Tensor

from cgspn.data import resize
from cgspn.data.loader import Batch
from cgspn.data.transforms import normalize, to_float
from cgspn.distill.tasks import SublayerTask
from cgspn.evaluate import cosine, relative_mse
from cgspn.models.encoder import Encoder

TOKENS = 1 << 16  # a batch, at most


def at_size(images: Tensor, px: int | tuple[int, int], encoder: Encoder) -> Tensor:
    """uint8 [N, 3, H, W] -> normalised float at a size in pixels."""
    config = encoder.config
    return normalize(resize(to_float(images), px), config.image_mean, config.image_std)


@torch.inference_mode()
def features(encoder: Encoder, images: Tensor, px: int | tuple[int, int]) -> Tensor:
    """Final grid tokens float32 [N, h, w, C] of uint8 images [N, 3, H, W] at a size, computed in bfloat16 on a GPU."""
    h, w = (px, px) if isinstance(px, int) else px
    tokens = (h // encoder.config.patch_size) * (w // encoder.config.patch_size)
    lower = torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda)
    with lower:
        parts = images.split(max(1, TOKENS // tokens))
        return torch.cat([encoder(at_size(part, (h, w), encoder)).tokens.float() for part in parts])


def scores(student: Encoder, teacher: Encoder, held: Tensor, px: int) -> dict[str, float]:
    """Cosine and relative error of the final grid tokens to the teacher's at the same size."""
    mine, theirs = features(student, held, px), features(teacher, held, px)
    return {"cosine": cosine(mine, theirs), "relative error": relative_mse(mine, theirs)}


@torch.inference_mode()
def sublayer_errors(student: Encoder, teacher: Encoder, held: Tensor, px: int) -> dict[str, float]:
    """Stage 1's loss of each block at a size: squared error over the mean square of the teacher's branch.

    Empty for a student whose sub-layers are all the teacher's.
    """
    task = SublayerTask(teacher, student)
    if not task.learning:
        return {}
    with torch.autocast(held.device.type, torch.bfloat16, enabled=held.is_cuda):
        few = held[: max(4, min(len(held), TOKENS // (px // 14) ** 2))]
        images = at_size(few, px, student)
        losses = task.losses(Batch(0, torch.arange(len(few)), images, torch.zeros(len(few), dtype=torch.int64)))
    return {name: float(value) for name, value in losses.items() if name != "total"}
