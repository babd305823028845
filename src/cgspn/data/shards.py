"""Image-text shards (webdataset tar) as one source with random access, so that no stream has to be replayed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .locate import Shard, locate, shown
from .samples import Sample, caption_of, digest_of
from .skipped import Skipped
from .tar_index import PARTS, TarIndex, load_index

AT_ONCE = 8  # shards that are indexed together: on network disks most of the time is waiting


@dataclass(frozen=True, eq=False)
class ShardSet:
    """The samples of shards, in the order of the shards and of each tar.

    Attributes:
        source: as the user wrote it.
        shards: those that hold samples.
        problems: shards that are lost or damaged; of a damaged one the samples before the damage are used.
        ends: for each shard, the number of samples up to its end.
        keys: uint8 [N, K], UTF-8 names padded with zeros.
        spans: int64 [N, len(PARTS), 2], offset and size in bytes of each of `PARTS`; -1 where there is none.
    """

    source: str
    shards: tuple[Shard, ...] = field(repr=False)
    problems: Skipped
    ends: Tensor = field(repr=False)
    # tensors, not arrays: workers that are not forked get these as shared memory
    keys: Tensor = field(repr=False)
    spans: Tensor = field(repr=False)

    def __len__(self) -> int:
        return len(self.spans)

    def name(self, number: int) -> str:
        """The shard, and the path in it without endings."""
        key = self.keys[number].numpy().tobytes().rstrip(b"\0")
        return f"{self._shard(number).name}: {key.decode(errors='replace')}"

    def read(self, number: int) -> Sample:
        """Read a sample. Raises OSError if its shard cannot be read as far as that."""
        parts = self.read_parts(number, ("image", "txt", "json"))
        encoded, text, data = parts["image"], parts["txt"], parts["json"]
        assert encoded is not None  # the index leaves out samples without an image
        return Sample(encoded, caption_of(text, data))

    def read_parts(self, number: int, wanted: tuple[str, ...]) -> dict[str, bytes | None]:
        """The bytes of some of `PARTS`; None for those that a sample lacks. Raises OSError as `read`."""
        found: dict[str, bytes | None] = {}
        with self._shard(number).path.open("rb") as file:
            for part in wanted:
                offset, size = self.spans[number, PARTS.index(part)].tolist()
                if offset < 0:
                    found[part] = None
                    continue
                file.seek(offset)
                found[part] = content = file.read(size)
                if len(content) < size:
                    raise OSError(f"{part}: the shard ends before byte {offset + size}")
        return found

    def digest(self) -> str:
        """As in `SampleSource`; where the shards are does not count."""
        return digest_of([self.ends.numpy().tobytes(), self.keys.numpy().tobytes()])

    def _shard(self, number: int) -> Shard:
        return self.shards[int(torch.searchsorted(self.ends, number, right=True))]


def open_shards(source: str, cache: Path, max_skipped: float = 0.1) -> ShardSet:
    """Find the shards of a source and index them.

    A shard that was indexed before and is lost or damaged now keeps its place, so that the order of the others stays
    what it was; its samples are skipped when their turn comes.

    Args:
        source: a path, a pattern with `{000..009}`, `{a,b}` or `*`, or a URL; URLs are fetched into `cache`, whole.
        cache: folder for fetched shards and indices.
        max_skipped: largest share of lost or damaged shards that is put up with, 0 to 1.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a wrong pattern, more problems than `max_skipped`, or no sample at all.
    """
    located = locate(source, cache)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = pool.map(lambda shard: _index(shard, cache), located)
        indexed = list(zip(located, shown(found, "indexing shards", len(located))))
    problems = tuple((shard.name, why) for shard, (_, why) in indexed if why)
    if len(problems) > max_skipped * len(located):
        named = "; ".join(f"{name}: {why}" for name, why in problems[:3])
        if len(located) == 1 and located[0].problem:
            raise FileNotFoundError(named)
        raise ValueError(
            f"{len(problems)} of {len(located)} shards are lost or damaged, more than {max_skipped:.0%} "
            f"(max_skipped): {named}"
        )
    kept = [(shard, index) for shard, (index, _) in indexed if index is not None and len(index)]
    if not kept:
        raise ValueError(f"{source}: no images in {len(located)} shards")
    indices = [index for _, index in kept]
    keys = np.concatenate([index.keys for index in indices])
    return ShardSet(
        source,
        tuple(shard for shard, _ in kept),
        Skipped(problems, len(located), "shards"),
        torch.tensor([len(index) for index in indices]).cumsum(0),
        torch.from_numpy(keys.view(np.uint8).reshape(len(keys), -1)),
        torch.from_numpy(np.concatenate([index.spans for index in indices])),
    )


def _index(shard: Shard, cache: Path) -> tuple[TarIndex | None, str]:
    """The index of a shard if there is any, and what is wrong with the shard."""
    try:
        index = load_index(shard.path, cache)
    except OSError as error:
        return None, shard.problem or str(error)
    return index, shard.problem or index.damage or ("" if len(index) else "holds no images")
