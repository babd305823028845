"""Argument checks of the public operators. Each error names the argument, its value and the accepted values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .eager import PLAIN
from .reference import DIRECTIONS

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_shape(name: str, t: Tensor, expected: tuple[int, ...], letters: str) -> None:
    """Raise ValueError unless `t` has exactly the expected shape; `letters` names its dimensions in the message."""
    if tuple(t.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(t.shape)}; expected {letters} = {expected}")


def check_choice(name: str, value: str, accepted: Sequence[str]) -> None:
    """Raise ValueError unless `value` is among the accepted values."""
    if value not in accepted:
        raise ValueError(f"{name} is {value!r}; accepted: {', '.join(map(repr, accepted))}")


def check_tensor(x: Tensor) -> None:
    """Raise TypeError unless `x` is a tensor with a dtype that the operators support."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x has dtype {x.dtype}; accepted: {', '.join(str(d) for d in DTYPES)}")


def check_features(x: Tensor, directions: int | None = None) -> None:
    """Raise TypeError or ValueError unless `x` is a non-empty [B, H, W, C] floating-point tensor.

    With `directions` it may also be [B, H, W, D, C].
    """
    check_tensor(x)
    if x.ndim != 4 and (directions is None or x.ndim != 5):
        also = "" if directions is None else ", or 5 [B, H, W, D, C]"
        raise ValueError(f"x has shape {tuple(x.shape)}; expected 4 dimensions [B, H, W, C]{also}")
    if x.ndim == 5 and x.shape[3] != directions:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, H, W, D, C] with D = {directions} directions")
    if 0 in x.shape[1:]:
        raise ValueError(f"x has shape {tuple(x.shape)}; H, W and C must be at least 1")


def check_like(x: Tensor, **others: Tensor) -> None:
    """Raise TypeError or ValueError unless every other tensor has the dtype and device of `x`."""
    for name, t in others.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
        if t.dtype != x.dtype:
            raise TypeError(f"{name} has dtype {t.dtype}; expected the dtype of x, {x.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name} is on {t.device}; expected the device of x, {x.device}")


def check_direction(direction: str, name: str = "direction") -> int:
    """The index of a direction in DIRECTIONS; raises ValueError for an unknown name."""
    check_choice(name, direction, DIRECTIONS)
    return DIRECTIONS.index(direction)


def check_directions(directions: Sequence[str]) -> list[int]:
    """Indices of a non-empty sequence of distinct directions; raises ValueError for anything else."""
    if isinstance(directions, str) or not directions:
        raise ValueError(f"directions is {directions!r}; expected a non-empty sequence out of {DIRECTIONS}")
    codes = [check_direction(d, f"directions[{i}]") for i, d in enumerate(directions)]
    if len(set(codes)) != len(codes):
        raise ValueError(f"directions is {tuple(directions)}; each direction may occur once")
    return codes


def check_mask(x: Tensor, mask: Tensor | None) -> None:
    """Raise TypeError or ValueError unless `mask` is None or bool [B, H, W] with the sizes and device of `x`."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a torch.bool tensor (True = inside the image) or None, got {got}")
    check_shape("mask", mask, tuple(x.shape[:3]), "[B, H, W]")
    if mask.device != x.device:
        raise ValueError(f"mask is on {mask.device}; expected the device of x, {x.device}")


def check_chunk(chunk: int | None) -> None:
    """Raise TypeError or ValueError unless `chunk` is None or a positive int."""
    if chunk is None:
        return
    if isinstance(chunk, bool) or not isinstance(chunk, int):
        raise TypeError(f"chunk must be an int or None, got {type(chunk).__name__}")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; expected None or at least 1 line")


def check_not_negative(mask: Tensor | None, lam: Tensor) -> None:
    """Raise ValueError if `lam` [B, H, W, ...] holds values below 0 where the mask is True (or anywhere)."""
    if type(lam) not in PLAIN:
        return
    low = lam.detach() < 0
    if mask is not None:
        low &= mask.view(*mask.shape, *[1] * (lam.ndim - 3))
    if low.any():
        raise ValueError(f"lam holds {int(low.sum())} values below 0; a normalised state accepts none")


class NonFiniteError(ValueError):
    """An argument holds NaN or infinity. The message says where."""


def check_finite(mask: Tensor | None = None, **tensors: Tensor) -> None:
    """Raise NonFiniteError if a tensor holds NaN or infinity where the mask is True (or anywhere without a mask).

    Only for plain tensors in eager mode: a traced program has no values to check.
    """
    for name, t in tensors.items():
        if type(t) not in PLAIN:
            continue
        if not torch.isfinite(t.detach().sum()):  # one cheap pass first; the exact check only if this fails
            bad = ~torch.isfinite(t.detach())
            if mask is not None:
                bad &= mask.view(*mask.shape, *[1] * (t.ndim - 3))
            if bad.any():
                where = tuple(bad.nonzero()[0].tolist())
                raise NonFiniteError(
                    f"{name} holds {int(bad.sum())} values that are not finite, the first at {where}; "
                    "expected finite values"
                )
