"""Run by torchrun in test_parallel.py: distil a little student and write its losses and weights."""

import json
import sys
from pathlib import Path

import torch

from cgspn.data import load_embedded
from cgspn.distill import ComputeConfig, DistillConfig, HighResConfig, LossConfig, OptimConfig, distil, join_world
from cgspn.layers import AttentionConfig
from cgspn.models import TextConfig, build_dual, model_config
from cgspn.teachers import convert


def run(out: Path, *, folder: Path | None = None, steps: int = 4, die_at: int = -1, **compute) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = model_config(
        "vit_mini_patch4_28", width=48, mixers=("attention",) * 3, mlp_hidden=96, attention=AttentionConfig(heads=2)
    )
    teacher = build_dual(config, TextConfig(width=16, depth=1, heads=2), 16).eval()
    student = convert(teacher.image, compression=4)
    optimizer, accumulate = compute.pop("optimizer", "adamw"), compute.pop("accumulate", 1)
    optim = OptimConfig(steps=steps, batch_size=16, ema=0.5, optimizer=optimizer, accumulate=accumulate)
    distill = DistillConfig(
        stage1=optim,
        stage2=optim,
        loss=LossConfig(contrastive=0.0 if accumulate > 1 else 0.3),
        highres=HighResConfig(sizes=(56,), optim=optim),
        compute=ComputeConfig(**compute),
    )

    def watcher(title, _):
        def watch(record):
            if title.endswith("stage 2") and record["step"] == die_at:
                import os
                import signal

                os.kill(os.getpid(), signal.SIGKILL)

        return watch

    images = load_embedded("train").subset(torch.arange(64))
    with join_world("cpu") as world:
        histories = distil(teacher, student, images, distill, watcher, folder=folder, world=world)
        if world.rank == 0:
            out.write_text(json.dumps([history.steps for history in histories]))
            torch.save(student.state_dict(), out.with_suffix(".pt"))


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    if "folder" in given:
        given["folder"] = Path(given["folder"])
    run(Path(sys.argv[1]), **given)
