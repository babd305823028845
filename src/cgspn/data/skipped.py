"""Records of unreadable images and shards, which are tolerated up to a limit."""

from collections.abc import Sequence
from dataclasses import dataclass, field

SHOWN = 10  # most names in a message; the object has all
FIRST = 1000  # the limit is a fraction of at least this many images


@dataclass(frozen=True)
class Skipped:
    """Images or shards, of `total` tried, that could not be read. what: plural noun for messages.

    files: name and reason of each, in the order of reading. unnamed: number of further ones not in `files`.
    """

    files: tuple[tuple[str, str], ...] = ()
    total: int = 0
    what: str = "images"
    unnamed: int = 0

    def __len__(self) -> int:
        return len(self.files) + self.unnamed

    def summary(self) -> str:
        """Return one line with the count, and one line for each of the first ten files."""
        lines = [f"skipped {len(self)} of {self.total} {self.what} that could not be read:"]
        lines += [f"  {name}: {reason}" for name, reason in self.files[:SHOWN]]
        if len(self) > SHOWN:
            lines.append(f"  and {len(self) - SHOWN} more")
        return "\n".join(lines)


@dataclass
class SkipCounter:
    """Counts the images that a run skips. An image that is skipped in several epochs counts once.

    source: name of the source, for messages. size: number of images in the source. limit: largest tolerated fraction of
    unreadable images, 0 to 1. read: number of images tried. used: number of images read. bad: name and reason of the
    others, by index.
    """

    source: str
    size: int
    limit: float
    read: int = 0
    used: int = 0
    bad: dict[int, tuple[str, str]] = field(default_factory=dict)

    def add(self, read: int, bad: Sequence[tuple[int, str, str]]) -> None:
        """Count the images that were read, and record index, name and reason of those that were not.

        Raises ValueError if there are more failures than the limit allows.
        """
        self.read += read + len(bad)
        self.used += read
        self.bad |= {number: (name, reason) for number, name, reason in bad}
        if len(self.bad) > self.limit * min(self.size, max(self.read, FIRST)):
            count, reasons = min(self.read, self.size), {reason for _, reason in self.bad.values()}
            if not self.used and len(reasons) == 1:
                raise ValueError(f"{self.source}: none of the images read so far can be used: {reasons.pop()}")
            shown = "; ".join(f"{name}: {reason}" for name, reason in list(self.bad.values())[:3])
            raise ValueError(
                f"{self.source}: {len(self.bad)} of the {count} images read so far cannot be "
                f"used, more than {self.limit:.0%} (max_skipped); among them {shown}"
            )

    def report(self) -> Skipped:
        """Return what has been skipped so far."""
        return Skipped(tuple(self.bad.values()), min(self.read, self.size))
