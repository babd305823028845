"""`cgspn distill`: distill a student in stages, on one process or, with torchrun, on several."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import tyro

from ..console import console, progress_watcher, writable_folder
from ..data import LoaderConfig, Skipped, load_embedded, open_samples
from ..data.prepare import Picture
from ..data.source import EMBEDDED
from ..distill import DistillConfig, ImageSetFeed, SampleFeed, World, distill, gather_objects, join_world
from ..distill.events import EventWatch, require_tensorboard
from ..distill.manifest import MOST_RECORD
from ..distill.parallel import barrier
from ..distill.presets import PRESETS
from ..distill.resume import RECORD, REPORT, carried_from, check_same_run, lacks_report, progress_of
from ..distill.run_folder import left_clean, locked
from ..distill.stages import Watcher
from ..distill.trainer import Watch
from ..environment import command, versions
from ..models.checkpoint import write_atomically
from ..models.dual import image_encoder, with_image
from ..models.encoder import Encoder
from ..models.reading import read_json_value
from ..ops.checks import check_choice
from ..report.charts import require_matplotlib
from ..report.held_out import MOST, Kept, compare
from ..report.run import run_report
from ..settings import Listed
from ..teachers import convert, load_encoder, load_model
from ..terminal import warn
from .checks import device_of, loaded, mixed_sizes, range_of
from .command import Command, Device, Out, Teacher
from .header import device_name, header, warnings

Preset = Literal["embedded", "vit-s14-study", "so400m-378", "so400m-highres"]
EVENTS = "events"


@dataclass(frozen=True)
class Distill(Command):
    """Convert a teacher and distill it: stage 1 for each sub-layer, stage 2 end to end, then optional higher
    resolutions.

    To resume an interrupted run from its last snapshot, repeat the command. You may change the settings of stages that
    have not started. All high resolutions count as one stage here.

    Examples:
        cgspn distill embedded runs/student --config.compression 3
        cgspn distill runs/vit runs/student --data photos/ --config.stage1.steps 200 --config.stage2.steps 1000
        cgspn distill embedded runs/student --config.highres.sizes 56 84
        cgspn distill runs/vit runs/student --data 'shards/photos-{000000..000099}.tar' --loader.workers 8
        cgspn distill runs/vit runs/student --data 'https://example.org/photos-{000000..000009}.tar'
        cgspn distill runs/vit runs/student --data photos/ --sizes 112 448 --aspects 1 1.33 0.75
        torchrun --nproc-per-node 8 -m cgspn.cli distill runs/vit runs/student --data photos/ --preset so400m-378
          --device cuda
    """

    usual: ClassVar = (
        *("preset", "data", "student", "sizes", "device", "tensorboard", "show_config"),
        *("config.compression", "config.value_expansion", "config.keep_attention", "config.image_size"),
        *("config.stage1.steps", "config.stage2.steps", "config.stage1.batch_size", "config.stage2.batch_size"),
        *("config.stage1.learning_rate", "config.stage2.learning_rate"),
        *("config.highres.sizes", "config.highres.optim.steps", "config.highres.optim.batch_size"),
        "config.highres.optim.accumulate",
        *("config.compute.precision", "config.compute.compile", "config.compute.save_every", "loader.workers"),
    )

    teacher: Teacher
    """A checkpoint (file, folder or hub id; encoder or image-text model), or "embedded"."""
    out: Out
    """Folder for the student, stages, snapshots, distill.json (command, versions, losses) and report.html."""
    preset: Preset = "embedded"
    """Named set of default settings."""
    data: str = "embedded"
    """Image-text shards (webdataset tar: a path, a URL or a pattern with {000..009} or *), a folder of images or
    shards, or "embedded". Captions come from .txt or .json files beside the images, or from the names of sub-folders.
    Unreadable images and shards are skipped, counted and reported. One image in a hundred, at most 16, is held out for
    the report and named in distill.json (held_out.names); none if there are fewer than a hundred."""
    student: Path | None = None
    """Start from this converted checkpoint instead of converting the teacher. The preset's settings of the student's
    mixers and positions then do not apply. With --config.stage1.steps 0 and --config.stage2.steps 0, continue a
    finished run at higher resolutions, with its adapters."""
    config: tyro.conf.AvoidSubcommands[DistillConfig | None] = None
    """All settings of the run; None uses those of the preset."""
    sizes: tuple[int, int] | None = None
    """Train stages 1 and 2 at mixed sizes: draw the size of each batch from this range, in pixels (config.sizes). All
    batches have about the same number of tokens, that of config.stage1.batch_size images of config.image_size pixels.
    The student then works well at all these sizes."""
    aspects: Listed[float] = ()
    """Aspect ratios (width / height) to combine with the sizes."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    """How image files are read; not used for the embedded images."""
    device: Device = "auto"
    """Device to run on; "auto" uses a GPU if there is one."""
    tensorboard: bool = False
    """Write TensorBoard event files to the folder (pip install 'cgspn[watch]'). View them with: tensorboard --logdir
    OUT."""
    report: bool = True
    """Write report.html at the end, with loss curves, errors per block, speed and settings (pip install
    'cgspn[report]')."""
    show_config: bool = False
    """Print the settings and stop."""

    def __post_init__(self) -> None:
        check_choice("preset", self.preset, tuple(PRESETS))

    @classmethod
    def start(cls, arguments: list[str]) -> Distill:
        """The default settings, with those of `--preset`, and a range of sizes if an option sets a field of it."""
        preset = ArgumentParser(add_help=False, allow_abbrev=False)
        preset.add_argument("--preset")
        name = preset.parse_known_args(arguments)[0].preset
        config = PRESETS.get(name, PRESETS["embedded"])
        return cls(tyro.MISSING, tyro.MISSING, config=replace(config, sizes=range_of(config.sizes, arguments)))

    @cached_property
    def settings(self) -> DistillConfig:
        """The effective config: the given one or the preset's, with sizes and aspects."""
        config = self.config or PRESETS[self.preset]
        if self.sizes or self.aspects:
            return replace(config, sizes=mixed_sizes(config.sizes, self.sizes, self.aspects))
        return config

    def run(self) -> None:
        """Raises ValueError, OSError, and the errors of `distill`."""
        student_from = str(self.student) if self.student else None
        settings: dict[str, Any] = {"teacher": self.teacher, "student": student_from, "data": self.data}
        settings["config"], settings["loader"] = asdict(self.settings), asdict(self.loader)
        if self.student is not None:
            self.check_taken()
            settings["config"] |= dict.fromkeys(self.settings.conversion)
        if self.show_config:
            console.print_json(json.dumps(settings, default=str))
            return
        if self.tensorboard:
            require_tensorboard()
        with left_clean(self.out) as own, join_world(device_of(self.device)) as world, ExitStack() as held:
            out = writable_folder(self.out, "out")
            barrier()  # a failing process removes the folder, and no other process may create it again
            held.enter_context(locked(out, world))
            own.append(True)
            feed = self.feed()
            if isinstance(feed, SampleFeed):
                say_skipped(feed.source.problems, world)
                settings["source"] = {"images": len(feed.source), "digest": feed.source.digest()}
            if self.report and lacks_report(out, settings):
                barrier()  # the others check before the first process writes
                if world.rank == 0:
                    write_report(out, read_json_value(out / RECORD, MOST_RECORD))
                return
            check_same_run(out, settings, world)
            barrier()  # as above, for files of the first process
            if world.rank == 0 and (begun := progress_of(out)):
                console.print(f"resuming the run in {out}: {begun}", soft_wrap=True)
            teacher = loaded(load_model, "teacher", self.teacher).to(world.device)
            encoder = image_encoder(teacher)
            torch.manual_seed(self.settings.stage1.seed)
            student = self.student_of(encoder).to(world.device)
            images = len(feed.images if isinstance(feed, ImageSetFeed) else feed.source)
            pictures, trained_on, names = pictures_of(feed)
            few = images if trained_on else None
            carried = carried_from(self.student) if self.student else None
            if world.rank == 0:
                for line in header(teacher, student, feed, images, self.settings, world, carried):
                    console.print(line, soft_wrap=True, markup=False)
                for line in warnings(self.teacher, self.preset, self.settings, world.device, self.student, few):
                    console.print(f"warning: {line}", soft_wrap=True, markup=False)
            with shown(world, out / EVENTS if self.tensorboard else None) as watcher:
                histories = distill(
                    teacher,
                    student,
                    feed,
                    self.settings,
                    watcher,
                    folder=out,
                    world=world,
                    carried=carried,
                )
            skipped, problems = Skipped(), Skipped()
            if isinstance(feed, SampleFeed):
                problems = feed.source.problems
                skipped = merged(gather_objects(feed.counter.report()), len(feed.source))
                say_skipped(skipped, world)
            peaks = gather_objects(torch.cuda.max_memory_allocated(world.device) if world.device.type == "cuda" else 0)
            if world.rank:
                return
            with_image(teacher, student).save_pretrained(out)
            record = {
                "command": command(),
                "versions": versions(),
                **settings,
                "processes": world.size,
                "device": device_name(world.device),
                "images": images,
                "peak_memory": max(peaks),
                "held_out": compare(encoder, student, pictures) | {"trained_on": trained_on, "names": names},
                "skipped": {"images": noted(skipped), "shards": noted(problems)},
                "throughput": {history.title: history.throughput for history in histories},
                "losses": {history.title: history.steps for history in histories},
            }
            write_atomically(out / RECORD, json.dumps(record, default=str) + "\n")
            console.print(f"student saved in {out}; losses in {out / RECORD}", soft_wrap=True)
            if "cosine" in record["held_out"]:
                which = "training" if trained_on else "held-out"
                near, count = record["held_out"]["cosine"], record["held_out"]["images"]
                size = "x".join(map(str, student.config.image_size))
                line = f"cosine similarity to {self.teacher} {near:.3f}, both at {size} px, on {count} {which} images"
                console.print(line, soft_wrap=True, markup=False)
            if self.report:
                write_report(out, json.loads(json.dumps(record, default=str)))

    def feed(self) -> ImageSetFeed | SampleFeed:
        """The source of training images for `data`. Raises OSError or ValueError."""
        if self.data == EMBEDDED:
            return ImageSetFeed(load_embedded("train"))
        source = loaded(open_samples, "data", self.data, cache=self.loader.cache, max_skipped=self.loader.max_skipped)
        return SampleFeed(Kept(source), self.loader, captioned=self.settings.loss.contrastive > 0)

    def check_taken(self) -> None:
        """Raise ValueError for conversion settings if `student` is already converted."""
        preset = PRESETS[self.preset].conversion
        for name, given in self.settings.conversion.items():
            if given != preset[name]:
                raise ValueError(f"config.{name} is {given}, and --student is already converted; omit one")

    def student_of(self, teacher: Encoder) -> Encoder:
        """The student before training."""
        if self.student is not None:
            return loaded(load_encoder, "student", self.student)
        return convert(teacher, **self.settings.conversion)


def pictures_of(feed: ImageSetFeed | SampleFeed) -> tuple[Iterable[Picture], bool, list[str]]:
    """The images on which student and teacher are compared, whether they were used in training, and the names of files
    that were not.

    For files these are the held-out images, or the first images if there are fewer than a hundred.
    """
    if isinstance(feed, SampleFeed) and isinstance(feed.source, Kept):
        return feed.source.pictures(), not feed.source.out, feed.source.held_out_names()
    return load_embedded("validation").images[:MOST], False, []


def write_report(out: Path, record: dict[str, Any]) -> None:
    """Write the report of a finished run, or print what is missing for it."""
    try:
        require_matplotlib()
    except ModuleNotFoundError as error:
        console.print(f"no report: {error}", soft_wrap=True)
        return
    try:
        page = run_report(record)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{out / RECORD} is not a record of a run: {type(error).__name__}: {error}") from error
    write_atomically(out / REPORT, page)
    console.print(f"report in {out / REPORT}", soft_wrap=True)


def merged(reports: list[Skipped], size: int) -> Skipped:
    """Combine the reports of skipped images from all processes. size: number of images in the source."""
    files = {name: reason for report in reports for name, reason in report.files}
    return Skipped(tuple(files.items()), min(size, sum(report.total for report in reports)))


def noted(skipped: Skipped) -> dict[str, Any]:
    """A report as JSON values for distill.json, with the names of at most a thousand skipped images."""
    return {"count": len(skipped), "of": skipped.total, "files": dict(skipped.files[:1000])}


def say_skipped(skipped: Skipped, world: World) -> None:
    """Print a non-empty report on standard error on the first process."""
    if skipped and world.rank == 0:
        warn(skipped.summary())


@contextmanager
def shown(world: World, events: Path | None) -> Iterator[Watcher | None]:
    """A watcher with progress bars, and event files in the folder `events`, on the first process only."""
    if world.rank:
        yield None
        return
    with progress_watcher() as watcher, ExitStack() as files:

        def both(title: str, steps: int) -> Watch:
            watches = [watcher(title, steps)]
            if events is not None:
                watches.append(files.enter_context(closing(EventWatch(events, title))))

            def watch(record: dict[str, float]) -> None:
                for each in watches:
                    each(record)

            return watch

        yield both
