"""Malicious and damaged input, generated from seeds: files that a user might get from others, changed at random.

    python -m benchmarks.probe_input --count 3000 --out results/safety/probes.json

Each probe runs in its own process, forked from one that has imported the package. A probe fails if it raises an
unexpected error, takes more than 20 s, needs more memory than `MOST` or twice the size of its files, runs a planted
program, or is killed by a signal. The first thousand probes are also a test.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import struct
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from PIL import Image
from safetensors.torch import save_file

import cgspn
from cgspn import cli
from cgspn.data import open_samples
from cgspn.data.decode import read_box, whole
from cgspn.data.labelled import open_labelled
from cgspn.data.prepare import open_picture
from cgspn.distill.manifest import entries_of, write_manifest
from cgspn.distill.snapshots import SnapshotError, Snapshots, check_snapshot
from cgspn.environment import describe
from cgspn.teachers.files import open_weights

MOST = 500 << 20  # bytes
SLOW = 20.0  # seconds
PLANTED = "PLANTED"
ODD: list[Any] = [None, True, -1, 0, 1, 1.5, 10**9, 10**400, float("nan"), float("inf"), "", "4", "x" * 5000, [], {}]
ODD += [[[]], [None], {"a": {"b": []}}, [1] * 2000, "../../etc/passwd", "\ud800", "[/red]\x1b[31m", [3, 4, 6, 3]]


LAYERS = {"attn.qkv": (96, 32), "attn.proj": (32, 32), "mlp.fc1": (64, 32), "mlp.fc2": (32, 64)}


class Program:
    """A pickle that creates a file when it is read unsafely."""

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {PLANTED}",))


def changed(value: Any, rng: random.Random) -> Any:
    """A JSON value in which one to three parts are replaced, removed or added."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        at = value
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(at[key], (dict, list)) and at[key] and rng.random() < 0.7:
                at = at[key]
                continue
            kind = rng.random()
            if kind < 0.75:
                at[key] = deepcopy(rng.choice(ODD))
            elif kind < 0.9:
                del at[key]
            elif isinstance(at, dict):
                at[f"{key}{rng.randint(0, 9)}"] = deepcopy(rng.choice(ODD))
            break
    return value


def noisy(content: bytes, rng: random.Random) -> bytes:
    """Bytes of which some are flipped, cut off, duplicated or inserted."""
    out = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out)) if out else 0
        kind = rng.random()
        if kind < 0.5 and out:
            out[at] = rng.randrange(256)
        elif kind < 0.65:
            del out[at:]
        elif kind < 0.8:
            out[at:at] = rng.randbytes(rng.randint(1, 64))
        else:
            out[at : at + 12] = rng.choice([b"\xff" * 12, b"\0" * 12, b"77777777777\0", b"-0000000512\0"])
    return bytes(out)


def write_json(path: Path, value: Any, rng: random.Random) -> None:
    """Write a JSON file, which is sometimes deeply nested, not UTF-8, or a list."""
    text = json.dumps(value).encode()
    path.write_bytes(text if rng.random() < 0.9 else rng.choice([b"[" * 50000, b"\xff\xfe" + text, b"[]", b"", b"1"]))


def own_model(root: Path, rng: random.Random) -> Callable[[], object]:
    """A checkpoint of this library with a changed config or changed weights."""
    model = cgspn.create_model("cgspn_mini_patch4_28") if rng.random() < 0.5 else cgspn.load_model("embedded")
    model.save_pretrained(root / "m")
    if rng.random() < 0.7:
        config = json.loads((root / "m/config.json").read_text())
        write_json(root / "m/config.json", changed(config, rng), rng)
    else:
        content = (root / "m/model.safetensors").read_bytes()
        head = 8 + int.from_bytes(content[:8], "little")
        (root / "m/model.safetensors").write_bytes(noisy(content[:head], rng) + content[head:])
    return lambda: cgspn.load_model(root / "m")


def foreign_model(root: Path, rng: random.Random) -> Callable[[], object]:
    """A timm file, and config files with random settings next to it."""
    width, t = 32, torch.zeros
    state = {"patch_embed.proj.weight": t(width, 3, 4, 4), "pos_embed": t(1, 50, width), "cls_token": t(1, 1, width)}
    for block in range(2):
        for name, shape in LAYERS.items():
            state |= {f"blocks.{block}.{name}.weight": t(shape), f"blocks.{block}.{name}.bias": t(shape[0])}
        for norm in ("norm1", "norm2"):
            state |= {f"blocks.{block}.{norm}.weight": t(width), f"blocks.{block}.{norm}.bias": t(width)}
    state |= {"norm.weight": t(width), "norm.bias": t(width), "patch_embed.proj.bias": t(width)}
    folder = root / "f"
    folder.mkdir()
    config = {
        "architecture": "vit_tiny_patch4_28",
        "num_hidden_layers": 2,
        "model_args": {"img_size": 28, "num_heads": 2, "act_layer": "gelu", "global_pool": "token"},
        "pretrained_cfg": {"input_size": [3, 28, 28], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9},
    }
    clip = {
        "model_cfg": {"embed_dim": 32, "vision_cfg": {"image_size": 28, "layers": 2, "width": 32, "head_width": 16}}
    }
    processor = {"size": {"height": 28, "width": 28}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    for name, value in (("config", config), ("open_clip_config", clip), ("preprocessor_config", processor)):
        if rng.random() < 0.7:
            write_json(folder / f"{name}.json", changed(value, rng), rng)
    kind = rng.random()
    if kind < 0.5:
        save_file(state, folder / "model.safetensors")
    elif kind < 0.75:
        names = {key: rng.choice(["a.safetensors", "../a.safetensors", "/etc/passwd", "b.index.json"]) for key in state}
        names = names if rng.random() < 0.7 else dict.fromkeys(state, "a.safetensors")
        save_file(state, folder / "a.safetensors")
        write_json(folder / "model.safetensors.index.json", changed({"weight_map": names}, rng), rng)
    else:
        hostile: Any = state | {"blocks.0.attn.qkv.weight": rng.choice([t(1).expand(96, 10**8), Program(), t(96, 32)])}
        torch.save(hostile, folder / "pytorch_model.bin")
        if rng.random() < 0.5:
            content = (folder / "pytorch_model.bin").read_bytes()
            (folder / "pytorch_model.bin").write_bytes(noisy(content, rng))
    return lambda: cgspn.load_model(folder, heads=2)


def shards(root: Path, rng: random.Random) -> Callable[[], object]:
    """A tar with all kinds of members and some changed bytes."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    kind = rng.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    with tarfile.open(root / "0.tar", "w", format=kind, encoding=rng.choice(["utf-8", "latin-1"])) as tar:
        for number in range(rng.randint(0, 12)):
            name = rng.choice(["a", "ä", "x.y", "n" * rng.randint(1, 5000), "d/e", "../up", "\x1b[31m", "[red]"])
            member = tarfile.TarInfo(f"{name}{number}{rng.choice(['.png', '.txt', '.json', '.cls', '', '.avif'])}")
            member.type = rng.choice([tarfile.REGTYPE] * 6 + [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE])
            content = rng.choice([picture.getvalue(), b"", b"{" * 10**5, b"9" * 5000])
            member.size = len(content) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(content))
    if rng.random() < 0.7:
        (root / "0.tar").write_bytes(noisy((root / "0.tar").read_bytes(), rng))

    def read() -> None:
        source = open_samples(str(root), cache=root / "cache", max_skipped=1.0)
        for number in range(len(source)):
            source.name(number)
            with contextlib.suppress(OSError):
                source.read(number)

    return read


def folder(root: Path, rng: random.Random) -> Callable[[], object]:
    """Class folders with damaged images, links to parent folders, FIFOs and unusual names."""
    for name in ("a", "b\udcff", "[c]"):
        (root / "f" / name).mkdir(parents=True)
        for number in range(2):
            content = io.BytesIO()
            Image.new("RGB", (9, 7)).save(content, rng.choice(["TIFF", "GIF", "JPEG", "PNG", "BMP"]))
            data = content.getvalue() if rng.random() < 0.4 else noisy(content.getvalue(), rng)
            if rng.random() < 0.1:
                data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(touch) system\n"
            (root / "f" / name / f"{number}.{rng.choice(['png', 'jpg', 'gif'])}").write_bytes(data)
        if rng.random() < 0.5:
            (root / "f" / name / "up").symlink_to(rng.choice(["..", ".", "/", "../a", "nowhere"]))
        if rng.random() < 0.3:
            os.mkfifo(root / "f" / name / "0.txt")

    def read() -> None:
        open_labelled(root / "f")
        source = open_samples(str(root / "f"), cache=root / "cache")
        for number in range(len(source)):
            with contextlib.suppress(OSError):
                source.read(number)

    return read


def snapshot(root: Path, rng: random.Random) -> Callable[[], object]:
    """A snapshot in which a file is changed, missing or added. It must not be used."""
    snapshots = Snapshots(root / "s", 1)
    with contextlib.redirect_stderr(io.StringIO()):
        snapshots.save(1, {"w": torch.ones(50)}, [{}])
    at = root / "s/00000001"
    path = rng.choice(sorted(at.iterdir()))
    kind = rng.random()
    before = path.read_bytes()
    if kind < 0.6:
        while path.read_bytes() == before:
            path.write_bytes(noisy(before, rng))
    elif kind < 0.75:
        path.unlink()
    else:
        (at / "0.safetensors").write_bytes(pickle.dumps(Program()))

    def read() -> None:
        check_snapshot(at, 1)
        if path.name != "manifest.json":  # of which white space may change
            raise AssertionError("a damaged snapshot was trusted")

    return read


def signed_snapshot(root: Path, rng: random.Random) -> Callable[[], object]:
    """A snapshot that is changed together with its manifest. It must be rejected or loaded without harm."""
    snapshots = Snapshots(root / "s", 1)
    with contextlib.redirect_stderr(io.StringIO()):
        snapshots.save(1, {"w": torch.ones(50)}, [{"total": 1.0}])
    at = root / "s/00000001"
    kind = rng.random()
    path = at / "0.safetensors"
    if kind < 0.4:
        path.write_bytes(noisy(path.read_bytes(), rng))
    elif kind < 0.8:
        write_json(at / "record.json", changed([{"total": 1.0}], rng), rng)
    else:
        piece = io.BytesIO()
        pickled(piece, rng)
        path.write_bytes(piece.getvalue())
    write_manifest(at, entries_of(at), 1)

    def read() -> None:
        check_snapshot(at, 1)
        snapshots.load(1, {"w": torch.zeros(50)})

    return read


ALLOCATING = b"\x80\2cbuiltins\nbytearray\n\x8a\6\0\0\0\0\x10\0\x85R."


def pickled(file: Any, rng: random.Random) -> None:
    """A pickle that looks as if written by `torch.save`."""
    state: dict[str, Any] = {"a": torch.ones(4), "b": {"c": torch.zeros(4)}}
    kind = rng.randrange(7)
    if kind == 0:
        for _ in range(rng.randint(1, 60)):
            state = {rng.choice("xyz"): state, "w": state}
    elif kind == 1:
        state["a"] = rng.choice([torch.zeros(1).expand(10**9), torch.zeros(2).to(torch.complex64), Program(), {1: 2}])
    elif kind == 2:
        state = {str(number): state["a"] for number in range(10**4)}
    old = rng.random() < 0.3
    if kind < 4 or old:
        content = io.BytesIO()
        torch.save(state, content, _use_new_zipfile_serialization=not old)
        data = content.getvalue()
        file.write(data if rng.random() < 0.5 else noisy(data, rng))
        return
    program = rng.choice([ALLOCATING, pickle.dumps(Program(), 2), b"\x80\2" + rng.choice([b"(", b"]", b"}"]) * 10**6])
    with zipfile.ZipFile(file, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
        archive.writestr("a/data.pkl", program if rng.random() < 0.7 else noisy(program, rng))
        archive.writestr("a/version", "3")
        for number in range(rng.choice([0, 0, 20_000])):
            archive.writestr(f"a/data/{number}", b"")


def pickle_file(root: Path, rng: random.Random) -> Callable[[], object]:
    """A .pt file of any kind, of which every tensor is read."""
    path = root / f"x{rng.choice(['.pt', '.pth', '.bin'])}"
    with path.open("wb") as file:
        pickled(file, rng)
    return lambda: [stored.read() for stored in open_weights(path)[0].values()]


def picture(root: Path, rng: random.Random) -> Callable[[], object]:
    """An image composed of parts with wrong sizes, tags and metadata, and very many of them."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    side, many = rng.choice([1, 8, 300, 9000, 60000, 2**31 - 1]), rng.choice([0, 1, 50, 200_000])
    tags = [(rng.randrange(250, 350), rng.randrange(14), rng.choice([1, 2, 10**6]), rng.choice([0, 1, 8, 2**32 - 1]))]
    tags = tags * rng.choice([1, 20, 5000]) + [(256, 4, 1, side), (257, 4, 1, 8), (258, 4, 1, 8), (259, 4, 1, 8)]
    tags += [(322, 4, 1, side), (323, 4, 1, side), (324, 4, 1, 8), (325, 4, 1, 9), (274, 3, 1, rng.randrange(10))]
    exif = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    shape = struct.pack(
        ">IIBBBBB", side, rng.choice([8, side]), rng.choice([1, 8, 16]), rng.choice([0, 2, 3, 6]), 0, 0, 0
    )
    text = chunk(rng.choice([b"zTXt", b"iCCP"]), b"a\0\0" + zlib.compress(bytes(10**7)))
    usual = io.BytesIO()
    Image.new("RGB", (64, 48)).save(usual, "JPEG", progressive=True)
    kinds = {
        "png": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", shape) + text * rng.randrange(3) + chunk(b"abCd", b"") * many
        + chunk(b"eXIf", exif) + chunk(b"IDAT", zlib.compress(bytes(10**5))) * 2 + chunk(b"IEND", b""),
        "tif": exif + bytes(64),
        "gif": b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0x80, 0, 0) + bytes(6) + b"!\xfe" + b"\4abcd" * many + b"\0,"
        + bytes(20),
        "jpg": usual.getvalue()[:2] + b"\xff\xfe\0\2" * many + usual.getvalue()[2:-2] + b"\xff\xda" * (many // 100),
        "ppm": b"P5 #" + b"a" * many + b"\n%d 8 %d\n" % (side, rng.choice([0, 255, 65535, 10**9])) + bytes(64),
    }  # fmt: skip
    content = kinds[rng.choice(list(kinds))]
    (root / "x.png").write_bytes(content if rng.random() < 0.6 else noisy(content, rng))

    def read() -> None:
        with contextlib.suppress(OSError, ValueError):
            read_box(root / "x.png", (8, 8), whole)
        open_picture(root / "x.png")

    return read


def options(root: Path, rng: random.Random) -> Callable[[], object]:
    """Command options with random values."""
    odd = ["0", "-1", "nan", "inf", "1e400", "x", "", "99999999999", "3.5", "[/x]", "\udcff", "{0..99999999}", "None"]
    commands = {
        "convert": ["--compression", "--keep-attention", "--value-expansion", "--keep-layers", "--heads", "--seed"],
        "show": ["--size", "--limit", "--layers", "--at", "--images", "--teacher", "--picture"],
        "export": ["--format", "--min-size", "--max-size", "--max-batch", "--device"],
        "eval zeroshot": ["--data", "--batch-size", "--templates", "--max-skipped", "--size"],
        "distill": [
            "--data",
            "--student",
            "--config.stage1.steps",
            "--config.stage1.batch-size",
            "--config.compression",
        ],
    }
    name = rng.choice(list(commands))
    arguments = [*name.split(), "embedded" if rng.random() < 0.8 else rng.choice(odd)]
    if name in ("convert", "export", "distill"):
        arguments.append(str(root / rng.choice(["out", "[/out]", "o\udcff"])))
    for option in rng.sample(commands[name], rng.randint(1, 2)):
        arguments += [option, rng.choice(odd)]
    if name in ("distill", "show", "eval zeroshot"):  # what would be begun if nothing were wrong takes minutes
        arguments += ["--device", "cuda"]
    return lambda: run_command(arguments)


def run_command(arguments: list[str]) -> None:
    """Run a command line. Raises AssertionError for another exit code than 0 or 2."""
    said = io.StringIO()
    argv, sys.argv = sys.argv, ["cgspn", *arguments]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            cli.main()
    except SystemExit as end:
        if end.code not in (0, 2, None) or "Traceback" in said.getvalue() or "--debug shows where" in said.getvalue():
            raise AssertionError(f"{arguments}: {end.code}: {said.getvalue()[-500:]}") from None
    finally:
        sys.argv = argv


KINDS = {
    "own model": own_model,
    "foreign model": foreign_model,
    "shards": shards,
    "folder": folder,
    "snapshot": snapshot,
    "signed snapshot": signed_snapshot,
    "pickle": pickle_file,
    "picture": picture,
    "options": options,
}
REFUSED = (ValueError, OSError, SnapshotError)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a probe: its kind, result, seconds, and growth of memory in bytes."""

    number: int
    kind: str
    end: str
    seconds: float
    memory: int


def probe(number: int, root: Path) -> str:
    """Run one probe in an empty folder. Returns "ok", "refused" or a description of the failure."""
    rng = random.Random(number)
    kind = list(KINDS)[number % len(KINDS)]
    read = KINDS[kind](root, rng)
    here = Path.cwd()
    os.chdir(root)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            read()
        end = "ok"
    except REFUSED:
        end = "refused"
    except BaseException as error:
        end = f"FAILED: {type(error).__name__}: {str(error)[:300]}"
    finally:
        os.chdir(here)
    return "FAILED: a planted program ran" if (root / PLANTED).exists() else end


def _child(number: int, root: Path, pipe: Any) -> None:
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    end = probe(number, root)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    pipe.send((end, time.process_time() - began, grown << 10))


def run_forked(number: int) -> Outcome:
    """Run one probe in its own process."""
    kind = list(KINDS)[number % len(KINDS)]
    root = Path(tempfile.mkdtemp())
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_child, args=(number, root, theirs))
    began = time.monotonic()
    child.start()
    try:
        if not ours.poll(6 * SLOW):
            child.kill()
            return Outcome(number, kind, "FAILED: it did not end", time.monotonic() - began, 0)
        try:
            end, seconds, memory = ours.recv()
        except EOFError:
            return Outcome(number, kind, f"FAILED: exit code {child.exitcode}", time.monotonic() - began, 0)
        size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
        if memory > max(MOST, 2 * size):
            end = f"FAILED: {memory >> 20} MiB"
        if seconds > SLOW:
            end = f"FAILED: {seconds:.0f} s"
        return Outcome(number, kind, end, seconds, memory)
    finally:
        child.join()
        shutil.rmtree(root, ignore_errors=True)


def main(count: int = 3000, start: int = 0, out: Path = Path("results/safety/probes.json")) -> None:
    """Run probes `start` to `start + count` - 1 and write their outcomes."""
    torch.set_num_threads(1)
    outcomes = []
    for number in range(start, start + count):
        outcomes.append(run_forked(number))
        print(json.dumps(asdict(outcomes[-1])), file=sys.stderr, flush=True)
    failed = [each for each in outcomes if each.end.startswith("FAILED")]
    kinds = {kind: dict(Counter(e.end.split(":")[0] for e in outcomes if e.kind == kind)) for kind in KINDS}
    record = {
        "machine": describe(program="python -m benchmarks.probe_input"),
        "probes": count,
        "kinds": kinds,
        "failed": [asdict(each) for each in failed],
        "largest growth of memory, MiB": max(each.memory for each in outcomes) >> 20,
        "longest, seconds of one core": round(max(each.seconds for each in outcomes), 2),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    tyro.cli(main)
