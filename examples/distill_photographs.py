"""Distill an encoder on a folder of photographs, from Python: what `cgspn distill TEACHER OUT --data FOLDER` does.

    python examples/distill_photographs.py photos/ --out runs/student
    python examples/distill_photographs.py photos/ --teacher google/siglip2-base-patch16-224 --size 224 --steps 2000

Without a teacher it takes the small one of the package, made for images of 28 px: minutes on a laptop, good for nothing
but a look. The folder may have sub-folders; images that cannot be read are counted and named.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.functional import cosine_similarity

import cgspn
from cgspn.data import open_samples
from cgspn.data.prepare import open_picture
from cgspn.distill import DistillConfig, OptimConfig, SampleFeed, distill
from cgspn.evaluate.predict import prepare_for


@torch.inference_mode()
def agreement(teacher: cgspn.Encoder, student: cgspn.Encoder, photographs: list[Path]) -> float:
    """Mean cosine of the student's final tokens to the teacher's."""
    prepare = prepare_for(teacher.config)
    images = torch.stack([prepare(open_picture(path)) for path in photographs])
    return cosine_similarity(student(images).tokens, teacher(images).tokens, dim=-1).mean().item()


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Returns the agreement of student and teacher before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--teacher", default="embedded", help="a file, folder or hub id of any known encoder")
    parser.add_argument("--out", type=Path, default=Path("runs/student"))
    parser.add_argument("--steps", type=int, default=200, help="of stage 2; stage 1 has half as many")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, help="pixels; the teacher's own if left out")
    parser.add_argument("--compare", type=int, default=16, help="photographs whose features are compared at the end")
    options = parser.parse_args(arguments)

    source = open_samples(str(options.folder))
    teacher = cgspn.load_encoder(options.teacher).eval()
    student = cgspn.convert(teacher, compression=4)
    suffixes = {".jpg", ".jpeg", ".png", ".webp"}
    files = sorted(path for path in options.folder.rglob("*") if path.suffix.lower() in suffixes)
    shown = files[:: max(1, len(files) // options.compare)][: options.compare]

    before = agreement(teacher, student.eval(), shown)
    stage2 = OptimConfig(steps=options.steps, batch_size=options.batch, optimizer="muon", learning_rate=1e-2)
    stage1 = replace(stage2, steps=options.steps // 2)
    config = DistillConfig(image_size=options.size, stage1=stage1, stage2=stage2)
    histories = distill(teacher, student, SampleFeed(source), config, folder=options.out)
    after = agreement(teacher, student, shown)
    student.save_pretrained(options.out)
    print(f"{len(source)} photographs, {sum(len(h.steps) for h in histories)} steps; student in {options.out}")
    print(f"cosine of the student's tokens to the teacher's: {before:.3f} before, {after:.3f} after")
    return before, after


if __name__ == "__main__":
    main()
