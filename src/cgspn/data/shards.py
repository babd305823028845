"""Image-text shards (webdataset tars) as one source with random access, so a run resumes without rereading."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .locate import Shard, locate, shown
from .samples import Sample, caption_of, digest_of
from .skipped import Skipped
from .tar_index import PARTS, TarIndex, load_index, shown_name

AT_ONCE = 8  # shards indexed concurrently, since network disks have high latency


@dataclass(frozen=True, eq=False)
class ShardSet:
    """The samples of shards, in the order of the shards and of the members of each tar.

    Attributes:
        problems: missing or damaged shards, and skipped samples of the others. The samples before the damage in a shard
            are used.
        ends: for each shard that contains samples, the number of samples up to its end.
        names, name_ends, spans: as `names`, `ends` and `spans` of `TarIndex`, for all shards.
    """

    source: str
    shards: tuple[Shard, ...] = field(repr=False)
    problems: Skipped
    ends: Tensor = field(repr=False)
    # tensors, because spawned workers get them as shared memory
    names: Tensor = field(repr=False)
    name_ends: Tensor = field(repr=False)
    spans: Tensor = field(repr=False)

    def __len__(self) -> int:
        return len(self.spans)

    def name(self, number: int) -> str:
        """The name of the shard, and the sample's path in it without extension."""
        start = int(self.name_ends[number - 1]) if number else 0
        key = self.names[start : int(self.name_ends[number])].numpy().tobytes()
        return f"{self._shard(number).name}: {shown_name(key)}"

    def read(self, number: int) -> Sample:
        """Read a sample. Raises OSError if its shard is unreadable or damaged before it."""
        parts = self.read_parts(number, ("image", "txt", "json"))
        encoded, text, data = parts["image"], parts["txt"], parts["json"]
        assert encoded is not None  # indexed samples have an image
        return Sample(encoded, caption_of(text, data))

    def read_parts(self, number: int, wanted: tuple[str, ...]) -> dict[str, bytes | None]:
        """Read some of the `PARTS` of a sample as bytes; None if missing. Raises OSError like `read`."""
        found: dict[str, bytes | None] = dict.fromkeys(wanted)
        with self._shard(number).path.open("rb") as file:
            for part in wanted:
                offset, size = self.spans[number, PARTS.index(part)].tolist()
                if offset >= 0:
                    file.seek(offset)
                    found[part] = content = file.read(size)
                    if len(content) < size:
                        raise OSError(f"{part}: the shard ends before byte {offset + size}")
        return found

    def digest(self) -> str:
        """See `SampleSource`. It does not depend on the location of the shards."""
        return digest_of([tensor.numpy().tobytes() for tensor in (self.ends, self.names, self.name_ends)])

    def _shard(self, number: int) -> Shard:
        return self.shards[int(torch.searchsorted(self.ends, number, right=True))]


def open_shards(source: str, cache: Path, max_skipped: float = 0.1) -> ShardSet:
    """Find and index the shards of a source.

    A shard that was indexed earlier and is now missing or damaged keeps its place, so the order of the others does not
    change. Its samples are skipped.

    Args:
        source: a path, a pattern with `{000..009}`, `{a,b}` or `*`, or a URL, which is downloaded completely.
        cache: folder for downloaded shards and indices.
        max_skipped: largest tolerated fraction of missing or damaged shards, 0 to 1.

    Raises FileNotFoundError if there are no such files, ValueError for an invalid pattern, more problems than
    `max_skipped`, or no sample at all.
    """
    return index_shards(source, locate(source, cache, max_skipped), cache, max_skipped)


def index_shards(source: str, located: Sequence[Shard], cache: Path, max_skipped: float = 0.1) -> ShardSet:
    """Index the given shards. source: their name in messages. Other arguments and errors are those of `open_shards`."""
    lost = tuple((shard.name, shard.problem) for shard in located if shard.problem)
    _check_problems(lost, located, max_skipped)  # before the shards are indexed
    with ThreadPool(AT_ONCE) as pool:  # its threads do not block an interrupt
        found = pool.imap(lambda shard: _index(shard, cache), located)
        indexed = list(zip(located, shown(found, "indexing shards", len(located))))
    problems = tuple((shard.name, why) for shard, (_, why) in indexed if why)
    _check_problems(problems, located, max_skipped)
    kept = [(shard, index) for shard, (index, _) in indexed if index is not None and len(index)]
    if not kept:
        raise ValueError(f"{source}: no images in {len(located)} shards{_named(problems)}")
    indices = [index for _, index in kept]
    starts = np.cumsum([0] + [len(index.names) for index in indices])
    return ShardSet(
        source,
        tuple(shard for shard, _ in kept),
        _skipped(problems, len(located), kept),
        torch.tensor([len(index) for index in indices]).cumsum(0),
        torch.from_numpy(np.concatenate([index.names for index in indices])),
        torch.from_numpy(np.concatenate([index.ends + start for index, start in zip(indices, starts)])),
        torch.from_numpy(np.concatenate([index.spans for index in indices])),
    )


def _check_problems(problems: Sequence[tuple[str, str]], located: Sequence[Shard], max_skipped: float) -> None:
    if len(problems) <= max_skipped * len(located):
        return
    if len(located) == 1 and located[0].problem:
        raise FileNotFoundError(_named(problems)[2:])
    raise ValueError(
        f"{len(problems)} of {len(located)} shards are missing or damaged, more than {max_skipped:.0%} "
        f"(max_skipped){_named(problems)}"
    )


def _named(problems: Sequence[tuple[str, str]]) -> str:
    """The first names of shards with problems, for the end of a message."""
    return ": " + "; ".join(f"{name}: {why}" for name, why in problems[:3]) if problems else ""


def _skipped(problems: tuple[tuple[str, str], ...], shards: int, kept: Sequence[tuple[Shard, TarIndex]]) -> Skipped:
    """A report of missing or damaged shards, and of samples left out in others."""
    left_out = tuple((f"{shard.name}: {name}", why) for shard, index in kept for name, why in index.left_out)
    unnamed = sum(index.unnamed for _, index in kept)
    if not left_out:
        return Skipped(problems, shards, "shards")
    total = shards + sum(len(index) for _, index in kept) + len(left_out) + unnamed
    return Skipped(problems + left_out, total, "shards and samples", unnamed)


def _index(shard: Shard, cache: Path) -> tuple[TarIndex | None, str]:
    """The index of a shard, if possible, and the problem with the shard."""
    try:
        index = load_index(shard.path, cache)
    except OSError as error:
        return None, shard.problem or str(error)
    reasons = [f"{name}: {why}" for name, why in index.left_out[:3]]
    empty = "" if len(index) else "; ".join(["holds no images", *reasons])
    return index, shard.problem or index.damage or empty
