"""TensorBoard event files of a stage, in the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FLUSH = 30  # seconds between writes to disk


def require_tensorboard() -> None:
    """Raise ModuleNotFoundError, naming the extra to install, if there is no TensorBoard."""
    try:
        import tensorboard  # type: ignore[import-untyped]  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "event files need tensorboard, which is not installed; run: pip install 'cgspn[watch]'", name="tensorboard"
        ) from error


class EventWatch:
    """A `Watch` that writes every value of a step into event files.

    A step that is repeated after a resume replaces the earlier one.
    """

    def __init__(self, folder: Path, title: str) -> None:
        """folder: for event files; title: the stage's title. Raises ModuleNotFoundError without TensorBoard."""
        require_tensorboard()
        self.folder = folder / title.replace(", ", "_").replace(" ", "_")
        self.writer: SummaryWriter | None = None

    def __call__(self, record: dict[str, float]) -> None:
        """Write a step. Raises OSError if the file cannot be written."""
        from torch.utils.tensorboard import SummaryWriter

        step = int(record["step"])
        if self.writer is None:
            self.writer = SummaryWriter(str(self.folder), purge_step=step, flush_secs=FLUSH)
        for name, value in record.items():
            if name != "step":
                self.writer.add_scalar(group_of(name), value, step)

    def close(self) -> None:
        """Flush and close the file."""
        if self.writer is not None:
            self.writer.close()


def group_of(name: str) -> str:
    """The TensorBoard group of a value, such as one for the PP losses of all blocks."""
    if name in ("images_per_second", "tokens_per_second", "data_wait_share", "mfu"):
        return f"speed/{name}"
    if name in ("lr", "gradient"):
        return f"optimisation/{name}"
    family, found, block = name.rpartition("block ")
    return f"{family.strip() or 'sub-layer'} of blocks/{int(block):02d}" if found else f"loss/{name}"
