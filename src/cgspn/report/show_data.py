"""The data of a photograph for `cgspn show`, and its encoding in the page."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, cosine_similarity

from ..models.encoder import Encoder
from .descriptors import Descriptors, describe
from .photographs import Photograph, encoder_input
from .scans import TOGETHER, layer_maps, look

CELLS = 5476  # most clickable cells: 74 x 74 patches are stored one by one, more are averaged
Place = tuple[float, float]


@dataclass(frozen=True)
class Flow:
    """For one layer of one model, the source positions that contribute to chosen patches.

    model: "teacher" or "student". kind: "down", "up", "right", "left", "together" or "attention". shares: uint8
    [P, rows, columns], of each cell of the grid: 255 * sqrt(influence / largest influence). halves: for each patch the
    radius, in patches, that contains half of the influence of other patches.
    """

    model: str
    kind: str
    shares: Tensor
    halves: list[float]


@dataclass(frozen=True)
class View:
    """One photograph with the models' features.

    features: by model, the tokens after the last norm, float32 [h, w, C]. cells: rows and columns of clickable cells, h
    and w unless these are too many. descriptors: by model, for the cells. points: (row, column) of the chosen patches,
    in cells. flows: by layer number, from 1. agreement: mean cosine of the two models' tokens; None for one model or
    different widths.
    """

    photograph: Photograph
    features: dict[str, Tensor]
    cells: tuple[int, int]
    descriptors: dict[str, Descriptors]
    points: list[tuple[int, int]]
    flows: dict[int, list[Flow]]
    agreement: float | None


def view(photograph: Photograph, models: Mapping[str, Encoder], layers: Sequence[int], places: Sequence[Place]) -> View:
    """Run every model on a photograph: "teacher" and "student", or one of them, with equal patch sizes.

    layers: numbers from 1. For a teacher of another depth, the layer at the same relative depth is used. places:
    positions of patches whose flows are computed, as fractions of height and width.
    """
    device = next(iter(models.values())).input_weight.device
    features: dict[str, Tensor] = {}
    found: dict[str, dict[int, dict[str, Tensor]]] = {}
    grid, positions = (0, 0), [(0, 0)]
    for name, model in models.items():
        matching = {
            layer: matching_layer(layer, models["student"].config.depth, model.config.depth) for layer in layers
        }
        seen = look(model, encoder_input(photograph, model.config).to(device), set(matching.values()))
        grid = (seen.grid.height, seen.grid.width)
        positions = [at(place, grid) for place in places]
        features[name] = seen.tokens
        found[name] = {layer: layer_maps(model, seen, index, positions) for layer, index in matching.items()}
    cells = fewer(grid)
    flows = {
        layer: [flow for name in models for flow in _flows(name, found[name][layer], positions, cells)]
        for layer in layers
    }
    agreement = None
    if len(models) == 2 and len({f.shape for f in features.values()}) == 1:
        teacher, student = features.values()
        agreement = float(cosine_similarity(teacher, student, dim=-1).mean())
    descriptors = {name: describe(_pooled(f.permute(2, 0, 1), cells).permute(1, 2, 0)) for name, f in features.items()}
    points = [(r * cells[0] // grid[0], c * cells[1] // grid[1]) for r, c in positions]
    return View(photograph, features, cells, descriptors, points, flows, agreement)


def matching_layer(layer: int, depth: int, other: int) -> int:
    """Index of the block, in a model of `other` blocks, at the relative depth of `layer` (from 1) in `depth` blocks."""
    return layer - 1 if depth == other else round((layer - 1) * (other - 1) / max(1, depth - 1))


def at(place: Place, grid: tuple[int, int]) -> tuple[int, int]:
    """The patch at a place given as fractions of height and width."""
    return min(int(place[0] * grid[0]), grid[0] - 1), min(int(place[1] * grid[1]), grid[1] - 1)


def fewer(grid: tuple[int, int]) -> tuple[int, int]:
    """The grid size, or one of the same aspect ratio with at most CELLS cells."""
    shrink = max(1.0, (grid[0] * grid[1] / CELLS) ** 0.5)
    rows = max(1, int(grid[0] / shrink))
    return rows, max(1, min(int(grid[1] / shrink), CELLS // rows))


def packed(seen: View) -> dict[str, Any]:
    """A view as JSON for the page's script: numbers, and all arrays concatenated, deflated and base64-encoded.

    The order is: descriptor codes by model, then flows by layer, in the order of `layers`.
    """
    arrays = [d.codes for d in seen.descriptors.values()] + [f.shares for flows in seen.flows.values() for f in flows]
    data = zlib.compress(b"".join(a.contiguous().numpy().tobytes() for a in arrays), 9)
    return {
        "cells": seen.cells,
        "points": seen.points,
        "models": [
            {"name": name, "steps": [float(f"{step:.7g}") for step in d.steps.tolist()]}
            for name, d in seen.descriptors.items()
        ],
        "layers": [
            {
                "number": number,
                "flows": [
                    {"key": f"{f.model}-{f.kind}", "halves": [round(half, 1) for half in f.halves]} for f in flows
                ],
            }
            for number, flows in seen.flows.items()
        ],
        "data": base64.b64encode(data).decode("ascii"),
    }


def _flows(
    model: str, maps: dict[str, Tensor], positions: Sequence[tuple[int, int]], cells: tuple[int, int]
) -> list[Flow]:
    """The flows of one layer and model. All directions share a scale per position, so that they can be compared."""
    small = {kind: _pooled(values, cells) for kind, values in maps.items()}
    whole = small.get(TOGETHER, next(iter(small.values()))).clone()
    h, w = next(iter(maps.values())).shape[1:]
    for i, (row, column) in enumerate(positions):
        whole[i, row * cells[0] // h, column * cells[1] // w] = 0  # the influence on itself would dominate the scale
    top = whole.flatten(1).amax(1).clamp(min=1e-30)[:, None, None]
    return [
        Flow(
            model,
            kind,
            ((small[kind] / top).clamp(0, 1).sqrt() * 255).round().to(torch.uint8),
            [reach(one, position) for one, position in zip(values, positions)],
        )
        for kind, values in maps.items()
    ]


def reach(values: Tensor, position: tuple[int, int], share: float = 0.5) -> float:
    """The radius, in patches, that contains the fraction `share` of the influence of all other positions; 0 if none.

    values: [h, w], non-negative; the value at the position (row, column) itself is ignored. share: 0 to 1.
    """
    rows = torch.arange(values.shape[0], dtype=torch.float64)[:, None] - position[0]
    columns = torch.arange(values.shape[1], dtype=torch.float64)[None] - position[1]
    distance = (rows.square() + columns.square()).sqrt().flatten()
    weight = torch.where(distance > 0, values.detach().double().flatten(), 0.0)
    if float(weight.sum()) == 0:
        return 0.0
    order = distance.argsort()
    summed = weight[order].cumsum(0) / weight.sum()
    first = min(int((summed < share - 1e-12).sum()), len(order) - 1)
    return float(distance[order][first])


def _pooled(maps: Tensor, cells: tuple[int, int]) -> Tensor:
    """Average [K, h, w] to [K, rows, columns]."""
    return maps if maps.shape[1:] == cells else adaptive_avg_pool2d(maps[None], cells)[0]
