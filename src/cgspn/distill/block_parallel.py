"""Stage 1 with each block on one process. Processes exchange the teacher's features, but no gradients."""

from collections import deque
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..models.encoder import Encoder
from .tasks import SublayerTask, sublayer_parts

AHEAD = 2  # rounds in flight: one overlaps with a block, two also with blocks of uneven duration


class Exchange(NamedTuple):
    """An unfinished round: requests to wait for, tensors being sent (kept alive until then), and the receive buffer."""

    work: dist.Work | None
    sent: Tensor
    received: Tensor

    def wait(self) -> Tensor:
        """The features [B, N, C] of one block for all images; [0, N, C] if the round has no block for this process."""
        if self.work is not None:
            self.work.wait()
        return self.received


class PlacedSublayerTask(SublayerTask):
    """Like `SublayerTask`, but each block is trained by a single process, on the images of all processes.

    Each process runs the teacher on its own share of the batch and sends every block's features to the block's owner,
    in rounds of one block per process. Communication of later rounds overlaps with the computation of earlier ones, and
    sent features are freed. Optimiser state and gradients exist only once in the run. Paper: stage 1, with independent
    blocks (docs/paper.md).
    """

    reduction: Literal["mean", "sum"] = "sum"

    def __init__(self, teacher: Encoder, student: Encoder, **options: Any) -> None:
        """Needs an initialised process group. Also raises ValueError for fewer learning blocks than processes."""
        super().__init__(teacher, student, **options)
        if 0 < len(self.learning) < dist.get_world_size():
            raise ValueError(
                f"parallel is 'placed' with {dist.get_world_size()} processes; each needs a block to train, and the "
                f"student has {len(self.learning)}"
            )

    @property
    def owned(self) -> list[list[int]]:
        """The blocks of each process, round robin."""
        return [self.learning[rank :: dist.get_world_size()] for rank in range(dist.get_world_size())]

    def own_blocks(self) -> list[int]:
        """See `SublayerTask`."""
        return self.owned[dist.get_rank()]

    def features_of_own(self, *features: dict[int, Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield each own block with the features of all images, [B, N, C] each.

        features: by block, the features of this process's images, [b, N, C]; they are removed once sent.
        """
        rounds = max(map(len, self.owned))
        coming = ([self._begin(kind, number) for kind in features] for number in range(rounds))
        begun = deque(islice(coming, AHEAD))
        for i in self.own_blocks():
            arrived = [exchange.wait() for exchange in begun.popleft()]
            begun.extend(islice(coming, 1))  # started before the block is launched
            yield i, arrived
        for exchange in chain(*begun, *coming):  # the last round may have blocks for other processes only
            exchange.wait()

    def _begin(self, features: dict[int, Tensor], number: int) -> Exchange:
        """Start a round: send features [b, N, C] to each block's owner, and receive those of the own block."""
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
