"""Load every kind of teacher from files of its original library, and compare tokens and pooled output with that
library.

All weights are random and affect the output (biases, LayerScale, norms, positions). Models have their full size unless
the row says otherwise, and only one is in memory at a time. Needs timm, open_clip_torch and transformers, with a
torchvision that can be imported:

    python -m venv parity && parity/bin/pip install torch torchvision timm open_clip_torch transformers . 'tyro>=0.9'
    parity/bin/python -m benchmarks.teacher_parity --out results/teachers

Writes parity.json and parity.md after every model; exits 1 if a relative error is not below 1e-5.
"""

from __future__ import annotations

import gc
import json
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import cgspn
from cgspn import environment
from cgspn.bench.results import write

LIMIT = 1e-5
Pair = tuple[Tensor, Tensor]  # grid tokens [B, N, C] after the last norm, and the pooled output [B, D]
CLIP_B = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
CLIP_H = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
DINO_S = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "patch_size": 14, "image_size": 518}
DINO_G = {"hidden_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 24, "patch_size": 14, "image_size": 518}


@dataclass(frozen=True)
class Case:
    """A model of a library. make: creates it and a function (model, images) -> Pair; save: writes it to a folder.
    grids: grids of patches at which it is compared; None is the native one.
    """

    library: str
    model: str
    make: Callable[[], tuple[nn.Module, Callable[[Tensor], Pair]]]
    save: Callable[[nn.Module, Path], Any]
    grids: tuple[tuple[int, int] | None, ...] = (None, (12, 20))


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Set every parameter to random values far from 0 and 1, with activations of order one at any depth."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        factor = parameter.ndim < 2 and name.endswith(("weight", "gamma", "lambda1"))  # of norms and LayerScale
        fan_in = 1 if parameter.ndim < 2 or "pos" in name else parameter[0].numel()
        scale = 0.2 if fan_in == 1 else 0.7 * fan_in**-0.5
        parameter.normal_(float(factor), scale, generator=generator)
    return model.eval()


def timm_case(name: str, **arguments: Any) -> Case:
    """A model of timm, saved as `save_for_hf` writes it: config.json and model.safetensors."""

    def make() -> tuple[nn.Module, Callable[[Tensor], Pair]]:
        import timm

        model = timm.create_model(name, dynamic_img_size=True, weight_init="skip", **arguments)
        clip = "clip" in name

        def run(images: Tensor) -> Pair:
            features = model.forward_features(images)
            return features[:, model.num_prefix_tokens :], model.forward_head(features, pre_logits=not clip)

        return model, run

    def save(model: Any, folder: Path) -> None:
        given = {key: value for key, value in arguments.items() if key in ("depth", "img_size")}
        stated = {"architecture": name, "global_pool": model.global_pool, "model_args": given}
        (folder / "config.json").write_text(json.dumps(stated))
        save_file(model.state_dict(), folder / "model.safetensors")

    shown = name + "".join(f", {key} {value}" for key, value in arguments.items() if key in ("depth", "img_size"))
    return Case("timm", shown, make, save)


def vit_s14_case(path: Path) -> Case:
    """A file of real weights in timm's layout, compared with timm's model of them."""

    def make() -> tuple[nn.Module, Callable[[Tensor], Pair]]:
        from timm.layers import resample_abs_pos_embed
        from timm.models import vision_transformer

        model, run = timm_case("vit_small_patch14_dinov2").make()
        if "without antialias" in safe_open(path, "pt").metadata().get("pos_embed", ""):  # else timm's own way
            vision_transformer.resample_abs_pos_embed = partial(resample_abs_pos_embed, antialias=False)
        state = {key: value.float() for key, value in load_file(path).items()}
        model.load_state_dict(state)
        return model, run

    def save(model: nn.Module, folder: Path) -> None:
        (folder / path.name).symlink_to(path.resolve())

    return Case("timm", f"{path.name} (real weights)", make, save)


def openclip_case(name: str) -> Case:
    """An image tower of OpenCLIP with the smallest text tower, saved as OpenCLIP saves a model for the hub."""

    def settings() -> dict[str, Any]:
        import open_clip

        config: dict[str, Any] = open_clip.get_model_config(name)
        small = {"layers": 1, "width": 64, "heads": 2, "vocab_size": 100, "context_length": 8}
        config["text_cfg"] = {k: v for k, v in config["text_cfg"].items() if not k.startswith("hf_")} | small
        return config

    def create(config: dict[str, Any]) -> Any:
        import open_clip

        rest = {key: value for key, value in config.items() if key != "custom_text"}
        with torch.device("meta"):  # its initialisation takes minutes
            model = open_clip.factory.CustomTextCLIP(**rest)
        return model.to_empty(device="cpu")

    def make() -> tuple[nn.Module, Callable[[Tensor], Pair]]:
        import open_clip

        model = create(settings())
        visual = model.visual
        native = visual.image_size if isinstance(visual.image_size, int) else visual.image_size[0]

        def run(images: Tensor) -> Pair:
            size = list(images.shape[2:])
            if hasattr(visual, "trunk"):
                visual.trunk.set_input_size(img_size=size)
                return visual.trunk.forward_features(images), visual(images)
            tower, own = visual, visual.positional_embedding.data
            if size != [native, native]:  # OpenCLIP resizes positions when it loads weights
                p = visual.patch_size[0]
                state = {"visual.positional_embedding": own}
                tower.grid_size = (size[0] // p, size[1] // p)
                open_clip.factory.resize_pos_embed(state, model)
                tower.positional_embedding.data = state["visual.positional_embedding"]
            tower.output_tokens = True
            pooled, tokens = tower(images)
            tower.positional_embedding.data = own
            return tokens, pooled

        return model, run

    def save(model: nn.Module, folder: Path) -> None:
        stated = {"model_cfg": settings(), "preprocess_cfg": {}}
        (folder / "open_clip_config.json").write_text(json.dumps(stated))
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")

    return Case("open_clip_torch", name, make, save)


def transformers_case(shown: str, model_class: str, config_class: str, **settings: Any) -> Case:
    """An image tower of transformers, saved by `save_pretrained`."""

    def make() -> tuple[nn.Module, Callable[[Tensor], Pair]]:
        import transformers
        from transformers.initialization import no_init_weights

        with no_init_weights():
            model: Any = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings))

        def run(images: Tensor) -> Pair:
            if model_class.startswith("Siglip2"):
                return naflex(model, list(images))
            if model_class.startswith("Dinov2"):
                hidden = model(images).last_hidden_state
                return hidden[:, 1 + getattr(model.config, "num_register_tokens", 0) :], hidden[:, 0]
            if model_class.startswith("Siglip"):
                out = model(images, interpolate_pos_encoding=True)
                return out.last_hidden_state, out.pooler_output
            out = model(images, interpolate_pos_encoding=True)
            tower = getattr(model, "vision_model", model)
            return tower.post_layernorm(out.last_hidden_state[:, 1:]), out.image_embeds

        return model, run

    return Case("transformers", shown, make, lambda model, folder: model.save_pretrained(folder))


def naflex(model: Any, images: list[Tensor]) -> Pair:
    """SigLIP 2 NaFlex on images of different sizes, padded as by its image processor."""
    p = model.config.patch_size
    grids = [(image.shape[1] // p, image.shape[2] // p) for image in images]
    longest = max(h * w for h, w in grids)
    patches = torch.zeros(len(images), longest, p * p * 3)
    mask = torch.zeros(len(images), longest, dtype=torch.long)
    for i, (image, (h, w)) in enumerate(zip(images, grids)):
        patches[i, : h * w] = image.view(3, h, p, w, p).permute(1, 3, 2, 4, 0).reshape(h * w, -1)
        mask[i, : h * w] = 1
    out = model(patches, mask, torch.tensor(grids))
    tokens = [row[: h * w] for row, (h, w) in zip(out.last_hidden_state, grids)]
    same = len(set(grids)) == 1
    return torch.stack(tokens) if same else torch.cat(tokens)[None], out.pooler_output


def siglip(patch: int, size: int, **width: int) -> dict[str, Any]:
    """The config of a SigLIP tower of fixed size."""
    return {**width, "patch_size": patch, "image_size": size}


def cases(vit_s14: Path | None) -> list[Case]:
    """Every model, in the order of the table."""
    clip = ("CLIPVisionModelWithProjection", "CLIPVisionConfig")
    sig, sig2 = ("SiglipVisionModel", "SiglipVisionConfig"), ("Siglip2VisionModel", "Siglip2VisionConfig")
    dino, reg = ("Dinov2Model", "Dinov2Config"), ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig")
    found = [
        transformers_case("CLIP ViT-B/16", *clip, **siglip(16, 224, **CLIP_B), projection_dim=512),
        transformers_case("CLIP ViT-L/14", *clip, **siglip(14, 224, **CLIP_L), projection_dim=768),
        transformers_case("CLIP ViT-L/14, 336 px", *clip, **siglip(14, 336, **CLIP_L), projection_dim=768),
        transformers_case("CLIP ViT-H/14", *clip, **siglip(14, 224, **CLIP_H), projection_dim=1024, hidden_act="gelu"),
        transformers_case("SigLIP ViT-B/16", *sig, **siglip(16, 224, **CLIP_B)),
        transformers_case("SigLIP SO400M/14, 384 px", *sig, **siglip(14, 384, **SO400M)),
        transformers_case("SigLIP 2 NaFlex ViT-B/16", *sig2, **CLIP_B, patch_size=16, num_patches=256),
        transformers_case("SigLIP 2 NaFlex SO400M/16", *sig2, **SO400M, patch_size=16, num_patches=256),
        transformers_case("DINOv2 ViT-S/14", *dino, **DINO_S),
        transformers_case("DINOv2 ViT-S/14, registers", *reg, **DINO_S),
        transformers_case("DINOv2 ViT-g/14 (SwiGLU), depth 4", *dino, **DINO_G, use_swiglu_ffn=True),
        timm_case("vit_small_patch14_dinov2"),
        timm_case("vit_base_patch14_reg4_dinov2"),
        timm_case("vit_giant_patch14_dinov2", depth=4, img_size=224),
        timm_case("vit_base_patch16_clip_224", num_classes=512),
        timm_case("vit_base_patch16_clip_quickgelu_224", num_classes=512),
        timm_case("vit_large_patch14_clip_224", num_classes=768),
        timm_case("vit_base_patch16_siglip_224", num_classes=0),
        timm_case("vit_base_patch16_siglip_gap_224", num_classes=0),
        timm_case("vit_so400m_patch14_siglip_378", num_classes=0),
        timm_case("vit_base_patch16_224", num_classes=1000),
    ]
    names = ("ViT-B-32", "ViT-B-16-quickgelu", "ViT-L-14", "ViT-L-14-CLIPA", "ViT-H-14", "ViT-B-16-SigLIP")
    found += [openclip_case(name) for name in (*names, "ViT-SO400M-14-SigLIP-384", "ViT-SO400M-14-SigLIP2-378")]
    return found + ([vit_s14_case(vit_s14)] if vit_s14 else [])


def relative(ours: Tensor, theirs: Tensor) -> float:
    """||ours - theirs|| / ||theirs||."""
    return ((ours - theirs).norm() / theirs.norm()).item()


@torch.no_grad()
def measure(case: Case) -> list[dict[str, Any]]:
    """Compare one model, with a row per size. The original is freed before ours is loaded."""
    torch.manual_seed(0)
    start = time.perf_counter()
    model, run = case.make()
    if "real weights" not in case.model:
        randomise(model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        case.save(model, folder)
        files = list(folder.iterdir())
        source = files[0] if len(files) == 1 else folder
        config = cgspn.load_encoder(source, dtype=torch.bfloat16).config
        p, native = config.patch_size, config.image_size
        batches = []
        for grid in case.grids:
            size = native if grid is None else (grid[0] * p, grid[1] * p)
            images = torch.randn(1 if config.width > 1000 or size[0] > 300 else 2, 3, *size)
            batches.append((images, run(images)))
        mixed = []
        if "NaFlex" in case.model:
            mixed = [torch.randn(3, h * p, w * p) for h, w in ((12, 20), (20, 9), (7, 7))]
            padded = naflex(model, mixed)
        del model, run
        gc.collect()
        encoder = cgspn.load_encoder(source)
        rows = []
        results = [(f"{images.shape[2]}x{images.shape[3]}", encoder(images), pair) for images, pair in batches]
        if mixed:
            outs = encoder.forward_variable_size(mixed, method="pad", max_shapes=1)
            joined = cgspn.EncoderOutput(
                torch.cat([out.tokens.flatten(0, 1) for out in outs])[None, :, None],
                torch.stack([o.pooled for o in outs]),
            )
            results.append(("padded batch of 192x320, 320x144, 112x112", joined, padded))
        for size, ours, (tokens, pooled) in results:
            rows.append(
                {
                    "library": f"{case.library} {version(case.library)}",
                    "model": case.model,
                    "M parameters": round(sum(q.numel() for q in encoder.parameters()) / 1e6, 1),
                    "size": size,
                    "tokens": relative(ours.tokens.flatten(1, 2), tokens),
                    "pooled": relative(ours.pooled, pooled),
                    "recognised as": config.name,
                }
            )
    print(f"{case.library} {case.model}: {time.perf_counter() - start:.0f} s", flush=True)
    return rows


def main(out: Path = Path("results/teachers"), vit_s14: Path | None = None, only: str = "", commit: str = "") -> int:
    """Measure all models (or those whose library or name contains `only`), write the results, and say whether every
    error is below 1e-5.

    Args:
        out: folder for parity.json and parity.md.
        vit_s14: also compare a file of real ViT-S/14 weights in timm's layout.
        only: part of a library's or model's name; the rows of all others in `out` stay as they are.
        commit: commit to record in the results; by default that of the working tree.
    """
    about = {
        "command": shlex.join(["python", "-m", "benchmarks.teacher_parity", *sys.argv[1:]]),
        "machine": f"{environment.cpu_name()}, float32",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cgspn": cgspn.__version__,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    at, title = commit or environment.commit(), "relative error of tokens and of the pooled output"
    path = out / "parity.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())[title] if only and path.exists() else []
    for case in cases(vit_s14):
        if only in f"{case.library} {case.model}":
            rows = [row for row in rows if row["model"] != case.model or not row["library"].startswith(case.library)]
            rows += [row | {"commit": at} for row in measure(case)]
            write(out, "parity", about, {title: rows})
    worst = max(max(row["tokens"], row["pooled"]) for row in rows)
    print(f"{len(rows)} comparisons, worst relative error {worst:.1e}, limit {LIMIT:.0e}")
    return int(not worst < LIMIT)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
