"""What losses are divided by: the size of the teacher's features, the same for all batches of a run."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .parallel import all_reduce


class TargetScales(nn.Module):
    """Mean squares of the teacher's features, measured once on the first batch of a run, over all processes.

    Losses are divided by these and not by those of each batch, so that the loss of a batch is the mean of the losses
    of its parts, however it is spread over processes and accumulated.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(count))
        self.known = False

    @torch.no_grad()
    def measure(self, parts: Iterable[list[Tensor]]) -> None:
        """Take the means over the parts of a batch, each a list of `count` features; once only."""
        values = self.get_buffer("values")
        if len(values) and not self.known and not bool(values.any()):
            means = [torch.stack([f.float().square().mean() for f in features]) for features in parts]
            values.copy_(all_reduce(torch.stack(means).mean(0)))
        self.known = True

    def of(self, features: list[Tensor]) -> Tensor:
        """One value a feature, float32 [count]; those of `features` if none were measured before."""
        self.measure([features])
        return self.get_buffer("values")
