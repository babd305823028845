"""Checks of benchmark settings. Each error names the argument, its value and the accepted values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..models.registry import model_config


def at_least(config: object, least: int, *names: str) -> None:
    """Raise ValueError unless each of these fields, or every number in them, is at least `least`."""
    for name in names:
        value = getattr(config, name)
        if not all(number >= least for number in _numbers(value)):
            each = " each" if isinstance(value, tuple) else ""
            raise ValueError(f"{name} is {value}; accepted: {least} or more{each}")


def not_empty(config: object, *names: str) -> None:
    """Raise ValueError if one of these fields is empty."""
    for name in names:
        if not getattr(config, name):
            raise ValueError(f"{name} is empty; expected one or more")


def tiled(name: str, pixels: int | tuple[int, ...], patch: int) -> None:
    """Raise ValueError unless each image side is a multiple of `patch` pixels."""
    wrong = [side for side in _numbers(pixels) if side < 1 or side % patch]
    if wrong:
        given = f"holds {wrong[0]}" if isinstance(pixels, tuple) else f"is {pixels}"
        raise ValueError(f"{name} {given}; accepted: multiples of the patch size {patch}")


def tiled_by(name: str, pixels: int | tuple[int, ...], models: Iterable[str]) -> None:
    """`tiled` for the patch size of each of these models."""
    for model in models:
        tiled(name, pixels, model_config(model).patch_size)


def known(name: str, models: Iterable[str]) -> None:
    """Raise ValueError for a model that does not exist."""
    for model in models:
        try:
            model_config(model)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def _numbers(value: Any) -> list[float]:
    return [number for part in value for number in _numbers(part)] if isinstance(value, tuple) else [value]
