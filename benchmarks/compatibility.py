"""Consistency of conversion, the timm and transformers classes, mixed sizes and export, with the error of each check.

Needs the extras hub, text, hf and export. timm's rows are added if timm can be imported.

    python -m benchmarks.compatibility --out results/compatibility
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cgspn
from cgspn.bench.results import write
from cgspn.environment import describe
from cgspn.export import export_model
from cgspn.models import Encoder

Row = dict[str, Any]
ROOT = Path(__file__).parents[1]
MODELS = ("vit_mini_patch4_28", "cgspn_mini_patch4_28", "gspn_mini_patch4_28", "hybrid_mini_patch4_28")


def relative(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b|| in float64."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def shaken(name: str) -> Encoder:
    """A registered model with random weights everywhere, because weights that are zero would hide mistakes."""
    torch.manual_seed(0)
    encoder = cgspn.create_model(name).eval()
    for parameter in encoder.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return encoder


def teachers(path: Path) -> list[Row]:
    """Rows about teachers, from the table that benchmarks/teacher_parity.py wrote."""
    worst: dict[str, list[float]] = defaultdict(list)
    for row in json.loads(path.read_text())["relative error of tokens and of the pooled output"]:
        worst[row["library"]] += [row["tokens"], row["pooled"]]
    return [
        {"point": 1, "what": f"load_encoder: {library}", "cases": len(errors), "relative error": max(errors)}
        for library, errors in worst.items()
    ]


def conversion() -> list[Row]:
    """Rows about conversion: inherited weights equal the teacher's."""
    rows = []
    for kept in (0, 1):
        teacher = shaken("vit_mini_patch4_28")
        student = cgspn.convert(teacher, compression=3, keep_attention=kept)
        theirs, mine = teacher.state_dict(), student.state_dict()
        names = [n for n in mine if n in theirs and "patch_embed.projection.bias" not in n]
        error = max(relative(mine[n], theirs[n]) for n in names)
        what = f"convert, {kept} attention layers stay: inherited tensors"
        rows.append({"point": 2, "what": what, "cases": len(names), "relative error": error})
    return rows


def registry() -> list[Row]:
    """Rows about the registry: every model, saved and loaded; large ones with two blocks of their real width."""
    errors = []
    for name in cgspn.list_models():
        config = cgspn.models.model_config(name)
        encoder = cgspn.create_model(name, mixers=config.mixers[-2:]).eval()
        images = torch.randn(1, 3, 3 * config.patch_size, 5 * config.patch_size)
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            encoder.save_pretrained(folder)
            out, again = encoder(images), cgspn.load_encoder(folder)(images)
            errors += [relative(a, b) for a, b in zip(again, out, strict=True)]
    what = "registry: each model saved and loaded, not square"
    return [{"point": 3, "what": what, "cases": len(errors) // 2, "relative error": max(errors)}]


def libraries() -> list[Row]:
    """Rows about transformers' Auto classes and timm: outputs, and bitwise equal weights after saving and loading."""
    from transformers import AutoModel

    import cgspn.models.hf

    try:
        import cgspn.models.timm_models as ours
    except (ImportError, RuntimeError):
        ours = None  # type: ignore[assignment]
    errors: dict[str, list[float]] = defaultdict(list)
    student = cgspn.convert(shaken("vit_mini_patch4_28"), compression=3, keep_attention=1).eval()
    for encoder in (*map(shaken, MODELS), student):
        images = torch.randn(2, 3, 28, 44)
        with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
            folder = Path(temporary)
            out = encoder(images)

            def trip(what: str, path: Path, images: Tensor = images, out: Any = out) -> None:
                again = cgspn.load_encoder(path)(images)
                errors[f"{what}, then load_encoder"] += [relative(a, b) for a, b in zip(again, out, strict=True)]

            encoder.save_pretrained(folder / "own")
            trip("save_pretrained", folder / "own")
            model = AutoModel.from_pretrained(folder / "own").eval()
            theirs = model(pixel_values=images)
            errors["transformers: AutoModel.from_pretrained"] += [
                relative(theirs.last_hidden_state[:, -out.tokens[0, ..., 0].numel() :], out.tokens.flatten(1, 2)),
                relative(theirs.pooler_output, out.pooled),
            ]
            for name, size in (("single", "1GB"), ("sharded", "200KB")):
                model.save_pretrained(folder / name, max_shard_size=size)
                trip(f"transformers: save_pretrained, {name}", folder / name)
            if ours is None:
                continue
            wrapped = ours.from_encoder(encoder)
            errors["timm: forward of from_encoder"].append(relative(wrapped(images), out.pooled))
            errors["timm: forward_features"].append(
                relative(wrapped.forward_features(images), encoder.forward_features(images))
            )
            ours.timm.models._hub.save_for_hf(wrapped, str(folder / "timm"))
            trip("timm: save_for_hf", folder / "timm")
            again = ours.timm.create_model(f"local-dir:{folder / 'timm'}", pretrained=True).eval()
            errors["timm: save_for_hf, then create_model"].append(relative(again(images), out.pooled))
    return [{"point": 4, "what": k, "cases": len(v), "relative error": max(v)} for k, v in errors.items()]


def mixed() -> list[Row]:
    """Rows about mixed sizes: features and gradients of images in one batch, compared with each image alone."""
    rows = []
    for method in ("pad", "bucket"):
        features, gradients = [], []
        for name in MODELS:
            encoder = shaken(name)
            sizes = ((28, 28), (12, 44), (4, 20), (60, 8))
            images = [torch.randn(3, h, w, requires_grad=True) for h, w in sizes]
            together, alone = encoder.forward_variable_size(images, method=method), [encoder(x[None]) for x in images]
            features += [relative(a.tokens, b.tokens[0]) for a, b in zip(together, alone)]
            features += [relative(a.pooled, b.pooled[0]) for a, b in zip(together, alone)]
            wanted = [*encoder.parameters(), *images]

            def loss(outputs: Any) -> Tensor:
                return torch.stack([o.tokens.square().mean() + o.pooled.square().mean() for o in outputs]).sum()

            flat = [
                torch.cat(
                    [g.flatten() for g in torch.autograd.grad(loss(o), wanted, allow_unused=True) if g is not None]
                )
                for o in (together, alone)
            ]
            gradients.append(relative(*flat))
        rows.append({"point": 5, "what": f"mixed sizes, {method}: features", "cases": len(features)})
        rows[-1]["relative error"] = max(features)
        rows.append({"point": 5, "what": f"mixed sizes, {method}: all gradients", "cases": len(gradients)})
        rows[-1]["relative error"] = max(gradients)
    return rows


def exports() -> list[Row]:
    """Rows about export: each format, loaded in its runtime, at the limits of its sizes."""
    rows = []
    for kind, suffix in (("onnx", ".onnx"), ("torch", ".pt2"), ("aot", ".pt2")):
        errors = []
        for name in ("vit_mini_patch4_28", "cgspn_mini_patch4_28", "hybrid_mini_patch4_28"):
            encoder = shaken(name)
            with tempfile.TemporaryDirectory() as folder:
                found = export_model(encoder, Path(folder) / f"m{suffix}", format=kind, max_size=44, max_batch=4)  # type: ignore[arg-type]
            errors += [error for parity in found for error in parity.errors.values()]
        rows.append({"point": 6, "what": f"export, {kind}", "cases": len(errors), "relative error": max(errors)})
    return rows


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    rows: list[Row] = []
    for part in (
        lambda: teachers(ROOT / "results/teachers/parity.json"),
        conversion,
        registry,
        libraries,
        mixed,
        exports,
    ):
        rows += part()
        print(rows[-1], flush=True)
        machine = describe(program="python -m benchmarks.compatibility")
        write(out, "compatibility", machine, {"rows": rows})


if __name__ == "__main__":
    main()
