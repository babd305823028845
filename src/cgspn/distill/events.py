"""TensorBoard: one run of curves a stage, in the folder of the run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .trainer import Watch

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FLUSH = 30  # seconds until curves are seen


def require_tensorboard() -> None:
    """Raise ModuleNotFoundError, naming the extra to install, if there is no TensorBoard."""
    try:
        import tensorboard  # type: ignore[import-untyped]  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "event files need tensorboard, which is not installed; run: pip install 'cgspn[watch]'", name="tensorboard"
        ) from error


def event_watch(folder: Path, title: str) -> Watch:
    """A `Watch` that writes every value of a step into event files of the stage `title`; a step that is run again
    after a resumption takes the place of the old one.

    Raises ModuleNotFoundError without TensorBoard, OSError where nothing can be written.
    """
    require_tensorboard()
    writers: list[SummaryWriter] = []

    def watch(record: dict[str, float]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        step = int(record["step"])
        if not writers:
            name = title.replace(", ", "_").replace(" ", "_")
            writers.append(SummaryWriter(str(folder / name), purge_step=step, flush_secs=FLUSH))
        for name, value in record.items():
            if name != "step":
                writers[0].add_scalar(group_of(name), value, step)

    return watch


def group_of(name: str) -> str:
    """Where TensorBoard shows a value: "PP block 3" is beside the other blocks' PP."""
    if name in ("images_per_second", "data_wait_share", "mfu"):
        return f"speed/{name}"
    if name in ("lr", "gradient"):
        return f"optimisation/{name}"
    family, found, block = name.rpartition("block ")
    return f"{family.strip() or 'sub-layer'} of blocks/{int(block):02d}" if found else f"loss/{name}"
