"""What test_parallel.py runs in processes of their own: distil a little student and write its losses and weights."""

import json
import os
import resource
import signal
import sys
from pathlib import Path

import torch

from cgspn.data import load_embedded
from cgspn.distill import (
    ComputeConfig,
    DistillConfig,
    HighResConfig,
    ImageSetFeed,
    LossConfig,
    OptimConfig,
    SizeRange,
    distill,
    join_world,
)
from cgspn.layers import AttentionConfig
from cgspn.models import TextConfig, build_dual, model_config
from cgspn.teachers import convert


class Noted(ImageSetFeed):
    """Writes down which images each process was given: a line for each step, whatever becomes of the process."""

    def stream(self, encoder, size, optim, world, sizes=None):
        stream = super().stream(encoder, size, optim, world, sizes)

        def start_at(start):
            for batch in stream(start):
                line = {"size": size[0], "step": batch.step, "rank": world.rank, "of": world.size}
                with open(os.environ["ORDER"], "a") as file:
                    file.write(json.dumps(line | {"indices": batch.indices.tolist()}) + "\n")
                yield batch

        return start_at


def run(out, *, folder=None, steps=4, hazards=None, only_once=None, device="cpu", **compute):
    """hazards: by the end of a stage's title, what happens after which step: "kill" (signal 9) or "full" (from there
    on no file may grow beyond 4 KiB). only_once: a file that tells a second attempt; then only the last rank is hit.
    With ORDER in the environment the images of every step are noted in the file that it names.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = model_config(
        "vit_mini_patch4_28", width=48, mixers=("attention",) * 3, mlp_hidden=96, attention=AttentionConfig(heads=2)
    )
    teacher = build_dual(config, TextConfig(width=16, depth=1, heads=2), 16, compute.pop("loss", "clip")).eval()
    student = convert(teacher.image, compression=4)
    optimizer, accumulate = compute.pop("optimizer", "adamw"), compute.pop("accumulate", 1)
    mixed = compute.pop("mixed", False)
    optim = OptimConfig(steps=steps, batch_size=16, ema=0.5, optimizer=optimizer, accumulate=accumulate)
    config = DistillConfig(
        stage1=optim,
        stage2=optim,
        loss=LossConfig(contrastive=0.0 if accumulate > 1 else 0.3),
        sizes=SizeRange(20, 36, 2, aspects=(1.0, 2.0)) if mixed else None,
        highres=HighResConfig(sizes=(56,), optim=optim),
        compute=ComputeConfig(**compute),
    )

    def watcher(title, _):
        def watch(record):
            for stage, (what, step) in (hazards or {}).items():
                if title.endswith(stage) and record["step"] == step:
                    meet(what)

        return watch

    def meet(what):
        if only_once is not None:
            if world.rank != world.size - 1 or Path(only_once).exists():
                return
            Path(only_once).touch()
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

    images = load_embedded("train").subset(torch.arange(64))
    feed = Noted(images) if "ORDER" in os.environ else images
    with join_world(device) as world:
        folder = Path(folder) if folder else None
        teacher, student = teacher.to(world.device), student.to(world.device)
        histories = distill(teacher, student, feed, config, watcher, folder=folder, world=world)
        if world.rank == 0:
            Path(out).write_text(json.dumps([history.steps for history in histories]))
            torch.save(student.cpu().state_dict(), Path(out).with_suffix(".pt"))


def enter(rank, size, port, log, out, settings):
    """One process of `size`, as torchrun starts them, without the seconds that its imports take."""
    with open(log, "a") as file:
        os.dup2(file.fileno(), 2)
        if size > 1:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            os.environ.update({k: str(v) for k, v in names.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        run(out, **settings)


if __name__ == "__main__":
    run(sys.argv[1], **json.loads(sys.argv[2]))
