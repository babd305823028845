"""The loop: a task, batches, AdamW or Muon with warm-up and cosine, a guard against NaN, a record of every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..data import Batch
from .config import OptimConfig
from .tasks import Task


class DivergedError(RuntimeError):
    """The loss or the gradient stopped being finite; the message says at which step and which part."""


@dataclass
class History:
    """Losses of every step: steps[i] is {"step": .., "lr": .., "total": .., ...}."""

    title: str
    steps: list[dict[str, float]] = field(default_factory=list)

    def curve(self, name: str) -> list[float]:
        """One loss over the steps."""
        return [step[name] for step in self.steps]


BETAS = (0.9, 0.98)

Watch = Callable[[dict[str, float]], None]


def learning_rate(config: OptimConfig, step: int) -> float:
    """The factor on the peak learning rate at a step: linear warm-up, then a cosine to zero."""
    warmup = max(1, round(config.steps * config.warmup))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup)))


class Optimizers:
    """Several optimisers over disjoint parameters, stepped as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        """parts: the optimisers."""
        self.parts = parts
        self.param_groups = [group for part in parts for group in part.param_groups]

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Update all weights."""
        for part in self.parts:
            part.step()


def build_optimizer(task: Task, config: OptimConfig) -> Optimizers:
    """Optimisers over fresh and inherited parameters, each split by whether they are matrices, which alone decay."""
    matrices: list[dict[str, Any]] = []
    rest: list[dict[str, Any]] = []
    for parameters, factor in zip(task.parameter_groups(), (1.0, config.inherited_rate), strict=True):
        rate = config.learning_rate * factor
        learned = [p for p in parameters if p.requires_grad]
        for groups, decay, chosen in (
            (matrices, config.weight_decay, [p for p in learned if p.ndim == 2]),
            (rest, config.weight_decay, [p for p in learned if p.ndim > 2]),
            (rest, 0.0, [p for p in learned if p.ndim < 2]),
        ):
            if chosen:
                groups.append({"params": chosen, "lr": rate, "peak": rate, "weight_decay": decay})
    if not matrices and not rest:
        raise ValueError("the task has no parameters to train")
    if config.optimizer == "adamw":
        return Optimizers(torch.optim.AdamW(matrices + rest, betas=BETAS))
    parts: list[torch.optim.Optimizer] = []
    if matrices:
        parts.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw"))
    if rest:
        parts.append(torch.optim.AdamW(rest, betas=BETAS))
    return Optimizers(*parts)


def train(task: Task, batches: Iterable[Batch], config: OptimConfig, title: str, watch: Watch | None = None) -> History:
    """Run a task over batches, one step each.

    Args:
        task: what is learned.
        batches: as many as config.steps; fewer end the run early.
        config: the optimisation.
        title: what the record is called.
        watch: called after every step with its losses (for a progress bar).

    Raises DivergedError at the first step whose loss or gradient is not finite, before it touches a weight.
    """
    optimizer = build_optimizer(task, config)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    history = History(title)
    for step, batch in zip(range(config.steps), batches):
        factor = learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        losses = task.losses(batch)
        optimizer.zero_grad()
        losses["total"].backward()
        norm = nn.utils.clip_grad_norm_(parameters, config.clip)
        record = {name: float(loss.detach()) for name, loss in losses.items()}
        bad = [name for name, value in record.items() if not math.isfinite(value)]
        if bad or not math.isfinite(float(norm)):
            raise DivergedError(f"{title}: {', '.join(bad) or 'the gradient'} is not finite at step {step}")
        optimizer.step()
        history.steps.append({"step": step, "lr": config.learning_rate * factor, "gradient": float(norm), **record})
        if watch is not None:
            watch(history.steps[-1])
    return history
