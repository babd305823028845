"""Evaluation datasets with classes or captions. Images stay on disk until they are decoded one by one."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from .captions import TEMPLATES, fill
from .clip_benchmark import is_clip_benchmark, open_benchmark_shards, read_lines
from .embedded import load_embedded
from .folder import SUFFIXES, list_folder
from .locate import cache_folder
from .opening import MOST_TEXT, read_bytes
from .prepare import Member, Picture
from .shards import ShardSet, open_shards
from .source import EMBEDDED


@dataclass(frozen=True, eq=False)
class LabelledPictures:
    """N labelled images. class_names are inserted into the prompt templates; labels: N class numbers."""

    name: str
    pictures: Sequence[Picture]
    labels: Sequence[int]
    class_names: tuple[str, ...]
    templates: tuple[str, ...] = TEMPLATES


@dataclass(frozen=True, eq=False)
class CaptionedPictures:
    """N images with one or more captions each."""

    name: str
    pictures: Sequence[Picture]
    captions: Sequence[tuple[str, ...]]


def set_name(source: str | Path) -> str:
    """The name of a source in tables: the last part of its path, without `.tar`."""
    return Path(source).name.removesuffix(".tar") or str(source)


def open_labelled(source: str | Path) -> LabelledPictures:
    """Open the labelled images of a source.

    source: "embedded" (its test split); a folder with a sub-folder for each class; a folder in the layout of
    CLIP-benchmark: test/0.tar ... with .cls files, classnames.txt, zeroshot_classification_templates.txt.

    Raises OSError if the source is missing or unreadable, and ValueError for another layout or a label without a name.
    """
    root = Path(source)
    if str(source) == EMBEDDED:
        images = load_embedded("test")
        pictures = [Image.fromarray(image[0].numpy()) for image in images.images]
        return LabelledPictures(EMBEDDED, pictures, images.labels.tolist(), images.class_names)
    if is_clip_benchmark(root):
        return _labelled_shards(root)
    if is_tars(source):
        raise ValueError(
            f"{source} names tars alone; zero-shot needs names of classes: expected the folder that holds "
            "classnames.txt and test/0.tar ... (CLIP-benchmark), or one with a sub-folder for each class"
        )
    names, files = list_folder(root)
    if len(names) < 2:
        raise ValueError(
            f"{root} holds {len(files)} images of one class, {names[0]!r}; expected a sub-folder for each of two "
            "classes or more, or classnames.txt and test/0.tar ... (CLIP-benchmark)"
        )
    return LabelledPictures(set_name(root), [f for f, _ in files], [k for _, k in files], names)


def _labelled_shards(root: Path) -> LabelledPictures:
    shards = open_benchmark_shards(root)
    names = tuple(read_lines(root / "classnames.txt", "the names of the classes, one per line"))
    path = root / "zeroshot_classification_templates.txt"
    templates = tuple(read_lines(path, "templates of captions, one per line")) if path.exists() else TEMPLATES
    for template in templates:
        fill(template, names[0])
    labels: list[int] = []
    for number in range(len(shards)):
        content = shards.read_parts(number, ("cls",))["cls"]
        if content is None:
            raise ValueError(f"{shards.name(number)} has no .cls file; expected a class number for each image")
        if not (digits := content.strip()).isdigit() or len(digits) > 9:
            raise ValueError(f"{shards.name(number)}: its .cls file holds {content[:20]!r}; expected a number")
        labels.append(int(digits))
        if labels[-1] >= len(names):
            accepted = f"0 to {len(names) - 1}, the lines of {root / 'classnames.txt'}"
            raise ValueError(f"{shards.name(number)} has class {labels[-1]}; accepted: {accepted}")
    return LabelledPictures(set_name(root), images_of(shards), labels, names, templates)


def open_captioned(source: str | Path) -> CaptionedPictures:
    """Open the captioned images of a source. Each line of a text file is a caption.

    source: a folder with images and .txt files of the same names at any depth; a folder in the layout of
    CLIP-benchmark, test/0.tar ... with .txt files; or tars with them, as a path, pattern or URL.

    Raises FileNotFoundError if no image has captions, and OSError or ValueError if the source cannot be read.
    """
    root = Path(source)
    if is_clip_benchmark(root) or is_tars(source):
        shards = open_benchmark_shards(root) if os.path.isdir(root) else open_shards(str(source), cache_folder())
        texts = [shards.read_parts(number, ("txt",))["txt"] or b"" for number in range(len(shards))]
        pictures: list[Picture] = images_of(shards)
    else:
        files = [file for file, _ in list_folder(root)[1]]
        beside = [file.with_suffix(".txt") for file in files]
        texts = [read_bytes(text, MOST_TEXT) if text.is_file() else b"" for text in beside]
        pictures = list(files)
    captions = [
        tuple(line.strip() for line in text.decode("utf-8-sig", errors="replace").splitlines() if line.strip())
        for text in texts
    ]
    kept = [number for number, lines in enumerate(captions) if lines]
    if not kept:
        kinds = ", ".join(sorted(SUFFIXES))
        raise FileNotFoundError(
            f"{source} holds {len(pictures)} images without captions; expected a .txt file beside each "
            f"(image files are {kinds})"
        )
    return CaptionedPictures(set_name(source), [pictures[n] for n in kept], [captions[n] for n in kept])


def is_tars(source: str | Path) -> bool:
    """Whether the name of a source ends like that of tars."""
    return str(source).endswith(".tar")


def images_of(shards: ShardSet) -> list[Picture]:
    """The images of samples as a sequence."""
    return [Member(shards, number, "image") for number in range(len(shards))]


def labels_of(pictures: LabelledPictures, kept: Sequence[int]) -> torch.Tensor:
    """The labels of the kept images, int64 [len(kept)]."""
    return torch.tensor([pictures.labels[number] for number in kept], dtype=torch.int64)
