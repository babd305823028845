"""Stage 1 with each block on one process: no gradient is ever exchanged, only the teacher's features."""

from collections import deque
from collections.abc import Iterator
from itertools import chain, islice
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..data import Batch
from ..models.encoder import Encoder
from .runtime import Runtime
from .tasks import Losses, SublayerTask, sublayer_parts

AHEAD = 2  # rounds of features under way: one hides behind a block, two behind blocks of uneven lengths


class Exchange(NamedTuple):
    """A round under way: what to wait for, what is being sent and must live until then, what will have arrived."""

    work: dist.Work | None
    sent: Tensor
    received: Tensor

    def wait(self) -> Tensor:
        """[B, N, C] of one block and all images; [0, N, C] if the round has no block for this process."""
        if self.work is not None:
            self.work.wait()
        return self.received


class PlacedSublayerTask(SublayerTask):
    """Like `SublayerTask`, but each block is trained by a single process, on the images of all processes.

    Each process runs the teacher on its own share of the batch and sends every block's features to the block's owner,
    in rounds of one block for each process: while one is computed, the next ones travel, and what has been sent is let
    go. Optimiser state and gradients exist once in the whole run. Paper: stage 1, whose blocks are independent
    (docs/paper.md).
    """

    reduction: Literal["mean", "sum"] = "sum"

    def __init__(
        self, teacher: Encoder, student: Encoder, learn_positions: bool = True, runtime: Runtime | None = None
    ) -> None:
        """Needs an initialised process group. Arguments and errors as in `SublayerTask`.

        Raises ValueError also for fewer blocks that learn than processes.
        """
        super().__init__(teacher, student, learn_positions, runtime)
        ranks = dist.get_world_size()
        if 0 < len(self.learning) < ranks:
            raise ValueError(
                f"parallel is 'placed' with {ranks} processes; each needs a block that learns, and the student has "
                f"{len(self.learning)}"
            )
        self.owned = [self.learning[rank::ranks] for rank in range(ranks)]  # in turn
        self.own = self.owned[dist.get_rank()]
        self.parts = nn.ModuleDict({str(i): sublayer_parts(student.each_block()[i]) for i in self.own})

    def losses(self, batch: Batch) -> Losses:
        """As in `SublayerTask`; losses of blocks that are elsewhere are zero, and so are left out of "total"."""
        taps = self.observed(batch)
        energies = self.energies.of(self.targets(taps))
        energy = dict(zip(self.learning, energies, strict=True))
        zero = energies.new_zeros(())
        losses: Losses = {f"block {i}": zero for i in self.learning}
        features = [{i: each[i] for i in self.learning} for each in (taps.block_inputs, taps.sublayers)]
        taps = taps._replace(block_inputs=[], sublayers=[], blocks=[])  # what is sent shall not be held here
        for i, (block_inputs, wanted) in self._arriving(features):
            losses[f"block {i}"] = self.sublayer_error(i, block_inputs, wanted, taps, energy[i])
        total = torch.stack([losses[f"block {i}"] for i in self.own]).sum() if self.own else zero
        return {"total": total, **losses}

    def _arriving(self, features: list[dict[int, Tensor]]) -> Iterator[tuple[int, list[Tensor]]]:
        """Own blocks in turn, with what the features [b, N, C] of this process's images are for all: [B, N, C] each.

        features: some kinds, by block; they are taken out once sent.
        """
        rounds = max(map(len, self.owned))
        coming = ([self._begin(kind, number) for kind in features] for number in range(rounds))
        begun = deque(islice(coming, AHEAD))
        for i in self.own:
            arrived = [exchange.wait() for exchange in begun.popleft()]
            begun.extend(islice(coming, 1))  # before the block, which is launched behind it
            yield i, arrived
        for exchange in chain(*begun, *coming):  # a last round may have blocks for others only
            exchange.wait()

    def _begin(self, features: dict[int, Tensor], number: int) -> Exchange:
        """Send this process's features [b, N, C] of each owner's block of a round, and ask for those of the own one."""
        ranks = dist.get_world_size()
        theirs = [owned[number : number + 1] for owned in self.owned]
        blocks = [features.pop(i) for owned in theirs for i in owned]
        (batch, *shape), size = blocks[0].shape, blocks[0].numel()
        own = len(theirs[dist.get_rank()])
        sent = torch.cat([block.reshape(-1) for block in blocks])
        received = sent.new_empty(ranks * own * size)
        sizes = [own * size] * ranks, [len(owned) * size for owned in theirs]
        work = dist.all_to_all_single(received, sent, *sizes, async_op=True)
        return Exchange(work, sent, received.view(ranks * own * batch, *shape))

    @torch.no_grad()
    def collect(self) -> None:
        """Send every block's weights from its owner to all."""
        blocks = self.student.each_block()
        for rank, owned in enumerate(self.owned):
            for i in owned:
                for parameter in sublayer_parts(blocks[i]).parameters():
                    dist.broadcast(parameter, rank)
