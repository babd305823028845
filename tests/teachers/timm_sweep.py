"""Every vision transformer that timm knows by name: it loads to parity, or is refused with a reason.

Weights are random and every one of them counts; models are two blocks deep and have their real width. Each is written
three times: as a folder with timm's config.json, as a file named after its architecture, and as a file with no name,
of which nothing is known but its tensors. Nothing may load and be wrong.

    pip install --no-deps timm && python tests/teachers/timm_sweep.py --out results/teachers
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from standins import import_library

import cgspn
from cgspn.bench.results import write as write_results
from cgspn.environment import describe
from cgspn.models import CheckpointError
from cgspn.teachers.formats.names import unsupported_reason

LIMIT = 1e-5
MODULES = ("deit", "vision_transformer", "eva", "beit", "vision_transformer_hybrid", "vision_transformer_relpos")
MODULES += ("vision_transformer_sam", "naflexvit")
LAYOUTS = ("folder", "named file", "bare file")
LARGEST = 260  # pixels: models of larger native sizes are built smaller, but for SigLIP, whose sizes tell its GELU


def names():
    """Of all vision transformers in timm."""
    timm = import_library("timm")
    return [name for module in MODULES for name in timm.list_models(module=module)]


def arguments(name):
    """Few blocks; a classifier of a few classes, or CLIP's projection."""
    timm = import_library("timm")
    large = any(word in name for word in ("large", "huge", "giant", "so400m", "1b", "3b", "7b", "5b", "enormous"))
    found = {"depth": 1 if large else 2, "num_classes": 10, "weight_init": "skip"}
    if "clip" in name and not name.startswith("eva"):
        found["num_classes"] = 512
    native = timm.models.get_pretrained_cfg(name)
    size = native.input_size[-1] if native else 224
    patch = 14 if "patch14" in name else 16
    if size > LARGEST and "siglip" not in name:
        found["img_size"] = 12 * patch
    return found


@torch.no_grad()
def randomised(model):
    """Every parameter far from zero, one and its neighbours; activations stay of order one."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        factor = parameter.ndim < 2 and name.endswith(("weight", "gamma", "gamma_1", "gamma_2"))
        fan_in = 1 if parameter.ndim < 2 or "pos" in name or "token" in name else parameter[0].numel()
        parameter.normal_(float(factor), 0.2 if fan_in == 1 else 0.7 * fan_in**-0.5, generator=generator)
    return model.eval()


def build(name):
    """The model and the arguments that timm's config.json would state.

    One that is refused by name is zeros in half precision: files that must not load need no values.
    """
    timm = import_library("timm")
    given, refused = arguments(name), unsupported_reason(name)
    for left_out in ((), ("weight_init",), ("weight_init", "img_size"), tuple(given)):
        attempt = {key: value for key, value in given.items() if key not in left_out}
        try:
            with torch.device("meta" if refused else "cpu"):
                model = timm.create_model(name, **attempt)
        except (TypeError, AssertionError):
            continue
        if refused:
            model = model.half().to_empty(device="cpu")
            for tensor in model.state_dict().values():
                tensor.zero_()
        return model.eval() if refused else randomised(model), attempt
    raise TypeError(name)


def write(name, model, given, folder):
    """One file under three names, for `LAYOUTS`."""
    paths = {layout: folder / layout / "weights.safetensors" for layout in LAYOUTS}
    paths["folder"] = paths["folder"].with_name("model.safetensors")
    paths["named file"] = paths["named file"].with_name(f"{name}.safetensors")
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "weights")
    for path in paths.values():
        path.parent.mkdir()
        path.hardlink_to(folder / "weights")
    stated = {"architecture": name, "global_pool": model.global_pool, "num_classes": model.num_classes}
    stated |= {"model_args": {key: value for key, value in given.items() if key in ("depth", "img_size")}}
    (folder / "folder" / "config.json").write_text(json.dumps(stated))
    return paths | {"folder": folder / "folder"}


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


@torch.no_grad()
def compare(model, encoder):
    """Relative errors of the grid tokens and of the pooled vector, at the native size."""
    config, size = encoder.config, model.patch_embed.img_size
    images = torch.randn(1, config.channels, *size, generator=torch.Generator().manual_seed(1))
    features = model.forward_features(images)
    pooled = model.forward_head(features, pre_logits=config.embed_dim is None)
    whole = [side if config.crop_remainder else side // config.patch_size * config.patch_size for side in size]
    ours = encoder(images[..., : whole[0], : whole[1]])
    tokens = relative(ours.tokens.flatten(1, 2), features[:, model.num_prefix_tokens :])
    return tokens, relative(ours.pooled, pooled)


def measure(name):
    """One row: the outcome of each layout, an error or a reason."""
    model, given = build(name)
    row = {"name": name, "width": model.num_features, "tokens": None, "pooled": None}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")  # a guess that a warning tells of is no wrong model in silence
        before = None
        for layout, source in write(name, model, given, Path(folder)).items():
            try:
                encoder = cgspn.load_encoder(source)
            except (CheckpointError, UserWarning) as error:
                row[layout] = str(error).replace(str(source), "it").removeprefix("it, recognised as ")
                continue
            if unsupported_reason(name):
                row[layout] = "WRONG: loads, though it is refused by name"
                continue
            if layout == "folder" or encoder.config != before:
                tokens, pooled = compare(model, encoder)
            before = encoder.config
            row[layout] = "parity" if max(tokens, pooled) < LIMIT else f"WRONG: {tokens:.1e}, {pooled:.1e}"
            if layout == "folder":
                row |= {"tokens": tokens, "pooled": pooled}
    return row


def report(folder, rows, commit, seconds):
    """Write what was measured so far; returns the counts of each layout."""
    counts = [
        {"layout": layout}
        | {"parity": sum(row[layout] == "parity" for row in rows)}
        | {"refused": sum(row[layout] != "parity" and not row[layout].startswith("WRONG") for row in rows)}
        | {"wrong": sum(row[layout].startswith("WRONG") for row in rows)}
        for layout in LAYOUTS
    ]
    facts = describe(commit, "python tests/teachers/timm_sweep.py") | {
        "timm": version("timm"),
        "seconds": f"{seconds:.0f}",
    }
    write_results(folder, "timm", facts, {f"{len(rows)} names": counts, "each": rows})
    return counts


def main(out="results/teachers", commit="", only=""):
    """Measure all, write timm.json and timm.md, and say whether none is wrong."""
    began, rows = time.monotonic(), []
    for name in names():
        if only in name:
            rows.append(measure(name))
            print(name, *(str(rows[-1][layout])[:60] for layout in LAYOUTS), sep=" | ", flush=True)
            counts = report(Path(out), rows, commit, time.monotonic() - began)
    print(counts)
    return any(count["wrong"] for count in counts)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
