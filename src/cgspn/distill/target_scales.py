"""Target scales: the mean squares of the teacher's features, by which losses are divided."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .parallel import all_reduce


class TargetScales(nn.Module):
    """Mean squares of the teacher's features, measured on the first batch of a run over all processes.

    They are constant in a run. So the loss of a batch is the mean of the losses of its parts, however the batch is
    split over processes and accumulation steps.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(count))
        self.known = False

    @torch.no_grad()
    def measure(self, parts: Iterable[list[Tensor]]) -> None:
        """On the first call, set scales to their features' mean squares over a batch (lists of `count` features)."""
        values = self.get_buffer("values")
        if len(values) and not self.known and not bool(values.any()):
            means = [torch.stack([f.float().square().mean() for f in features]) for features in parts]
            values.copy_(all_reduce(torch.stack(means).mean(0)))
        self.known = True

    def of(self, features: list[Tensor]) -> Tensor:
        """One value per feature, float32 [count]. They are measured on `features` if they are not known."""
        self.measure([features])
        return self.get_buffer("values")
