"""Stage 1 with each block on one process: no gradient is ever exchanged, only the teacher's features."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..data import Batch
from ..models.encoder import Encoder
from .tasks import Losses, SublayerTask, sublayer_parts


class PlacedSublayerTask(SublayerTask):
    """As `SublayerTask`, with block i trained by one process alone, on the images of all.

    Each process runs the teacher on its own share of the batch and sends every block's features to the block's owner.
    Optimiser state and gradients exist once in the whole run. `share` hands the weights back to everyone at the end.
    Source: "Key Designs" 3, stage 1 (blocks are independent); design, section 4.
    """

    reduction: Literal["mean", "sum"] = "sum"

    def __init__(self, teacher: Encoder, student: Encoder, learn_positions: bool = True) -> None:
        """Needs an initialised process group. Arguments and errors as in `SublayerTask`."""
        super().__init__(teacher, student, learn_positions)
        self.owned = [self.learning[rank :: dist.get_world_size()] for rank in range(dist.get_world_size())]
        self.capturable = False
        self.own = self.owned[dist.get_rank()]
        blocks = student.each_block()
        self.parts = nn.ModuleDict({str(i): sublayer_parts(blocks[i]) for i in self.own})

    def losses(self, batch: Batch) -> Losses:
        """As in `SublayerTask`; losses of blocks that are elsewhere are zero, and so are left out of "total"."""
        taps = self.observed(batch)
        energies = self.energies.of([taps.sublayers[i] for i in self.learning])
        entries, wanted = self._to_owners(taps.entries), self._to_owners(taps.sublayers)
        zero = energies.new_zeros(())
        losses: Losses = {f"block {i}": zero for i in self.learning}
        for i, energy in zip(self.learning, energies, strict=True):
            if i in entries:
                losses[f"block {i}"] = self.sublayer_error(i, entries[i], wanted[i], taps, energy)
        total = torch.stack([losses[f"block {i}"] for i in self.own]).sum() if self.own else zero
        return {"total": total, **losses}

    def _to_owners(self, features: list[Tensor]) -> dict[int, Tensor]:
        """features [b, N, C] of every block and this process's images -> [B, N, C] of own blocks and all images."""
        ranks, like = dist.get_world_size(), features[0]
        sent = torch.cat([features[i].reshape(-1) for owned in self.owned for i in owned])
        received = sent.new_empty(ranks * len(self.own) * like.numel())
        dist.all_to_all_single(
            received, sent, [len(self.own) * like.numel()] * ranks, [len(owned) * like.numel() for owned in self.owned]
        )
        parts = received.view(ranks, len(self.own), *like.shape)
        return {i: parts[:, n].flatten(0, 1) for n, i in enumerate(self.own)}

    @torch.no_grad()
    def share(self) -> None:
        """Send every block's weights from its owner to all."""
        blocks = self.student.each_block()
        for rank, owned in enumerate(self.owned):
            for i in owned:
                for parameter in sublayer_parts(blocks[i]).parameters():
                    dist.broadcast(parameter, rank)
