"""The decision whether a run resumes from its folder, and from where.

The folder has the student, record and adapters of each finished stage, and snapshots of the running one
(`Snapshots.newest_whole` gives the step from which the trainer resumes).
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from ..models.checkpoint import CONFIG, PREPROCESSING, WEIGHTS, write_atomically
from ..models.encoder import Encoder
from ..models.reading import CheckpointError, read_json
from ..models.weights import open_safetensors, read_state
from .manifest import check_manifest, entries_of, set_aside, write_manifest
from .parallel import World, gather_objects
from .snapshots import Snapshots

RUN, RECORD, REPORT = "run.json", "distill.json", "report.html"
LOSSES, THROUGHPUT, ADAPTERS = "losses.json", "throughput.json", "adapters.safetensors"
ORDER = ("stage1", "stage2", "highres")

Losses = list[dict[str, float]]


def identity(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that must be equal to resume a run: those that change the result."""
    wanted: dict[str, Any] = json.loads(json.dumps(settings, default=str))  # JSON has no tuples
    wanted["config"].pop("compute")
    wanted.pop("loader")
    return wanted


def lacks_report(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` holds a finished run with these settings that has no report yet."""
    unfinished = (out / RECORD).exists() and (out / RUN).exists() and not (out / REPORT).exists()
    return unfinished and read_json(out / RUN) == identity(settings)


def check_same_run(out: Path, settings: dict[str, Any], world: World) -> None:
    """Check that `out` can hold a run with these settings, and write them to it.

    Raises ValueError if it holds a finished run, a model that is not from a run, or an unfinished run with other
    settings. The settings of stages that have not started may change.
    """
    path = out / RUN
    if (out / RECORD).exists():
        raise ValueError(f"out is {out}, which holds a finished run; give another folder, or remove it to start over")
    made = (CONFIG, WEIGHTS, PREPROCESSING, REPORT)
    if not path.exists() and (held := [name for name in made if os.path.lexists(out / name)]):
        raise ValueError(f"out is {out}, which holds {', '.join(held)} of another model; give another folder")
    wanted = identity(settings)
    if begun := progress_of(out):
        if not path.exists():
            raise ValueError(f"out is {out}, which holds a run ({begun}) without its {RUN}; give another folder")
        found = read_json(path)
        try:
            for name in ahead_of(out, found["config"]):  # not used yet
                found["config"][name] = wanted["config"].get(name)
        except (LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} has no record of a run; expected config with {', '.join(ORDER)}") from error
        if found != wanted:
            changed = ", ".join(sorted(differences(found, wanted)))
            raise ValueError(
                f"out is {out}, which holds an unfinished run with other settings ({changed}); "
                "use the same settings to resume it, or another folder"
            )
    if world.rank == 0:
        write_atomically(path, json.dumps(wanted, indent=1) + "\n")


def begun_in(out: Path) -> tuple[list[int], dict[int, int]]:
    """The finished stages of the unfinished run in `out`, and the newest step of each stage with a snapshot."""
    done = sorted(int(path.parent.name) for path in (out / "stages").glob("*/losses.json") if is_number(path.parent))
    folders = [folder for folder in sorted((out / "snapshots").glob("*")) if is_number(folder)]
    newest = {int(folder.name): Snapshots(folder, 0).newest() for folder in folders}
    return done, {stage: step for stage, step in newest.items() if step and stage not in done}


def is_number(folder: Path) -> bool:
    """Whether a folder has the name of a stage."""
    return re.fullmatch(r"[0-9]{1,4}", folder.name) is not None


def progress_of(out: Path) -> str:
    """A description of what an unfinished run in `out` has completed; "" if there is nothing to resume."""
    done, under_way = begun_in(out)
    said = [f"{len(done)} {'stage' if len(done) == 1 else 'stages'} done"] if done else []
    return ", ".join(said + [f"stage {stage + 1} from step {step}" for stage, step in under_way.items()])


def ahead_of(out: Path, config: dict[str, Any]) -> list[str]:
    """The settings in a run's `config` that may still change: only stages that have not started in `out` use them."""
    done, under_way = begun_in(out)
    stages = [name for name in ORDER[:2] if config[name]["steps"]] + ["highres"] * len(config["highres"]["sizes"])
    begun = stages[: max([*done, *under_way]) + 1]
    ahead = list(ORDER[max(map(ORDER.index, begun), default=-1) + 1 :])
    # a contrastive loss also decides which images the running stage can use
    return [*ahead, "loss"] if "stage2" in ahead and not under_way else ahead


def differences(one: Any, other: Any, name: str = "") -> Iterator[str]:
    """Names of the settings in which two nested dicts differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            yield from differences(one.get(key), other.get(key), f"{name}.{key}" if name else key)
    elif one != other:
        yield name


@dataclass(frozen=True)
class StageFolders:
    """The stage folders of a run by number; None if the run has no folder. every: see `Snapshots`."""

    folder: Path | None
    every: int
    world: World

    def restore(self, number: int, student: Encoder) -> tuple[Losses, dict[str, Any], dict[str, Tensor]] | None:
        """Load a finished stage's weights into the student. Returns losses, throughput and adapters, or None. All
        processes must call this.

        A damaged stage is reported on standard error and renamed, and runs again.
        """
        if (done := self._of("stages", number)) is None:
            return None
        found: Any = None
        if self.world.rank == 0 and (done / LOSSES).exists():
            try:
                found = check_manifest(done, LOSSES), read_json(done / THROUGHPUT)
            except (CheckpointError, OSError) as error:
                set_aside(done, f"stage {number + 1} is damaged and run again: {error}")
        if (found := gather_objects(found)[0]) is None:
            return None
        student.load_state_dict(read_state(student, open_safetensors(done / WEIGHTS)[0], str(done)))
        return *found, read_tensors(done / ADAPTERS)

    def snapshots(self, number: int) -> Snapshots | None:
        """The snapshots of a stage; None if snapshots are off."""
        folder = self._of("snapshots", number)
        return Snapshots(folder, self.every) if folder and self.every else None

    def finish(
        self, number: int, student: Encoder, losses: Losses, throughput: dict[str, Any], carried: Mapping[str, Tensor]
    ) -> None:
        """Save the result of a stage on the first process. Raises OSError."""
        done = self._of("stages", number)
        if done is not None and self.world.rank == 0:
            student.save_pretrained(done)
            write_atomically(done / ADAPTERS, save(dict(carried)))
            write_atomically(done / THROUGHPUT, json.dumps(throughput))
            write_atomically(done / LOSSES, json.dumps(losses))
            write_manifest(done, entries_of(done), len(losses))

    def _of(self, kind: str, number: int) -> Path | None:
        return self.folder / kind / str(number) if self.folder else None


def carried_from(folder: Path) -> dict[str, Tensor]:
    """What the last stage of the run in `folder` left for a later run, on the CPU; empty if there is none."""
    stages = [path for path in (folder / "stages").glob(f"*/{ADAPTERS}") if is_number(path.parent)]
    return read_tensors(max(stages, key=lambda path: int(path.parent.name))) if stages else {}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU. Raises OSError, or CheckpointError for a damaged file."""
    return {name: stored.read() for name, stored in open_safetensors(path)[0].items()}
