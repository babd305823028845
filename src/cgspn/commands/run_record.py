"""What the folder of a run says about it: its settings, and how far it has come."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..distill.parallel import World
from ..distill.run_folder import HOLDER, LOCK
from ..distill.snapshots import Snapshots
from ..models.checkpoint import CONFIG, WEIGHTS, write_atomically
from ..models.reading import CheckpointError, read_json

RUN, RECORD, REPORT = "run.json", "distill.json", "report.html"
ORDER = ("stage1", "stage2", "highres")


@contextmanager
def left_clean(out: Path) -> Iterator[list[bool]]:
    """Take a folder away again that was made for a run which ended before it left anything in it.

    Entered before the processes of a run meet, so that each sees what was there before any of them made the folder; and
    each takes it away, since torchrun ends the others when one is refused. Yields a list to which the run adds an item
    once the folder is its own: that of another run is left alone.
    """
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    own: list[bool] = []
    try:
        yield own
    except BaseException:  # a refusal, a teacher that is damaged, an interruption
        ours = {RUN, LOCK, HOLDER} if own else set()
        with suppress(OSError):  # another process was first
            if missing and {path.name for path in out.iterdir()} <= ours:
                for name in ours:
                    (out / name).unlink(missing_ok=True)
                for folder in missing:
                    folder.rmdir()
        raise


def identity(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that make a run the same: what does not change the result may change between two attempts."""
    wanted: dict[str, Any] = json.loads(json.dumps(settings, default=str))  # JSON has no tuples
    wanted["config"].pop("compute")
    wanted.pop("loader")
    return wanted


def lacks_report(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` holds a finished run of these settings without its report: it was killed in between, or had not
    what reports need."""
    if not (out / RECORD).exists() or (out / REPORT).exists() or not (out / RUN).exists():
        return False
    return read_json(out / RUN) == identity(settings)


def check_same_run(out: Path, settings: dict[str, Any], world: World) -> None:
    """Note the settings of the run in `out`.

    Raises ValueError if it holds a finished run, a model that is of no run, or an unfinished run of other settings.
    Those of stages that have not begun may change.
    """
    path = out / RUN
    if (out / RECORD).exists():
        raise ValueError(f"out is {out}, which holds a finished run; give another folder, or remove it to begin again")
    if not path.exists() and (held := [name for name in (CONFIG, WEIGHTS) if (out / name).exists()]):
        raise ValueError(f"out is {out}, which holds {', '.join(held)} of something else; give another folder")
    wanted = identity(settings)
    begun = progress_of(out)
    if begun and not path.exists():
        raise ValueError(f"out is {out}, which holds a run ({begun}) without its {RUN}; give another folder")
    if begun:
        found = read_run(path)
        ahead = ahead_of(out, found["config"])
        for name in ahead:  # nothing was made of them yet
            found["config"][name] = wanted["config"].get(name)
        if found != wanted:
            changed = ", ".join(sorted(differences(found, wanted)))
            raise ValueError(
                f"out is {out}, which holds an unfinished run with other settings ({changed}); "
                "give those again to go on with it, or another folder"
            )
    if world.rank == 0:
        write_atomically(path, json.dumps(wanted, indent=1) + "\n")


def read_run(path: Path) -> dict[str, Any]:
    """The settings of a run. Raises CheckpointError for a file that does not hold such."""
    found = read_json(path)
    config = found.get("config")
    stages: list[Any] = [config.get(name) for name in ORDER] if isinstance(config, dict) else [None]
    if not all(isinstance(stage, dict) for stage in stages):
        raise CheckpointError(f"{path} is no record of a run; expected config with {', '.join(ORDER)}")
    steps, sizes = [stage.get("steps") for stage in stages[:2]], stages[2].get("sizes")
    if not all(isinstance(each, int) for each in steps) or not isinstance(sizes, list):
        raise CheckpointError(f"{path} is no record of a run; expected steps and sizes of its stages")
    return found


def is_number(name: str) -> bool:
    """Whether a name is that of a stage."""
    return re.fullmatch(r"[0-9]{1,4}", name) is not None


def begun_in(out: Path) -> tuple[list[int], dict[int, int]]:
    """The stages of an unfinished run in `out` that are done, and the last step of those that have a snapshot."""
    done = sorted(int(name) for path in (out / "stages").glob("*/losses.json") if is_number(name := path.parent.name))
    folders = [folder for folder in sorted((out / "snapshots").glob("[0-9]*")) if is_number(folder.name)]
    under_way = [folder for folder in folders if int(folder.name) not in done]
    newest = {int(folder.name): Snapshots(folder, 0).newest() for folder in under_way}
    return done, {stage: step for stage, step in newest.items() if step}


def progress_of(out: Path) -> str:
    """What an unfinished run in `out` has done, in words; "" if nothing that could be gone on with."""
    done, under_way = begun_in(out)
    said = [f"{len(done)} {'stage' if len(done) == 1 else 'stages'} done"] if done else []
    return ", ".join(said + [f"stage {stage + 1} from step {step}" for stage, step in under_way.items()])


def ahead_of(out: Path, config: dict[str, Any]) -> list[str]:
    """The settings, of a run's `config`, that only stages read which have not begun in `out`."""
    done, under_way = begun_in(out)
    stages = [name for name in ORDER[:2] if config[name]["steps"]] + ["highres"] * len(config["highres"]["sizes"])
    begun = stages[: max([*done, *under_way]) + 1]
    ahead = list(ORDER[max(map(ORDER.index, begun), default=-1) + 1 :])
    # a contrastive loss tells which images a stage can use, the one under way included
    return [*ahead, "loss"] if "stage2" in ahead and not under_way else ahead


def differences(one: Any, other: Any, name: str = "") -> Iterator[str]:
    """Names of the settings in which two nested dicts differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            yield from differences(one.get(key), other.get(key), f"{name}.{key}" if name else key)
    elif one != other:
        yield name
