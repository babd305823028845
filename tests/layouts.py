"""Data sets of a few tiny pictures in the layouts that users have on disk."""

import io
import tarfile

import numpy as np
from PIL import Image


def picture(seed, height=20, width=30):
    """Smooth colours, which survive JPEG."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def encoded(image, ending="png"):
    buffer = io.BytesIO()
    image.save(buffer, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[ending])
    return buffer.getvalue()


def write_tar(path, members):
    """members: bytes by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def clip_benchmark(root, pictures, labels, class_names, templates=("a photo of a {c}.",), per_shard=4):
    """test/0.tar, test/1.tar, ... with .png and .cls, and the text files beside."""
    for shard, first in enumerate(range(0, len(pictures), per_shard)):
        members = {}
        for i in range(first, min(first + per_shard, len(pictures))):
            members[f"s{i:07d}.cls"] = str(labels[i]).encode()
            members[f"s{i:07d}.png"] = encoded(pictures[i])
        write_tar(root / "test" / f"{shard}.tar", members)
    (root / "test" / "nshards.txt").write_text(str(shard + 1))
    (root / "classnames.txt").write_text("\n".join(class_names) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("\n".join(templates))
    return root


def ade20k(root, counts=(6, 4), classes=150, sizes=((24, 36), (30, 24)), seed=0):
    """images/ and annotations/, each with training/ and validation/; masks 0 to 150."""
    for split, count in zip(("training", "validation"), counts):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            height, width = sizes[i % len(sizes)]
            image, mask = scene(seed + 100 * (split == "validation") + i, height, width, classes)
            Image.fromarray(image).save(root / "images" / split / f"ADE_{i:08d}.png")
            Image.fromarray((mask + 1).astype(np.uint8)).save(root / "annotations" / split / f"ADE_{i:08d}.png")
    return root


def coco_stuff(root, counts=(5, 3), suffix="", highest=181):
    """train2017/, val2017/ and stuffthingmaps/; masks 0 to 181, 255 for what does not count."""
    for split, count in zip(("train2017", "val2017"), counts):
        (root / split).mkdir(parents=True)
        (root / "stuffthingmaps" / split).mkdir(parents=True)
        for i in range(count):
            image, mask = scene(500 + 100 * (split == "val2017") + i, 24, 32, 4)
            ids = np.where(mask < 0, 255, np.array([0, 17, 100, highest])[mask.clip(0)])
            Image.fromarray(image).save(root / split / f"{i:012d}.jpg", quality=95)
            target = root / "stuffthingmaps" / split / f"{i:012d}{suffix}.png"
            Image.fromarray(ids.astype(np.uint8)).save(target)
    return root


def scene(seed, height, width, classes):
    """An image uint8 [H, W, 3] whose colours tell the classes, and its mask [H, W], -1 where nothing counts."""
    rng = np.random.default_rng(seed)
    few = rng.choice(min(classes, 4), 4)
    mask = np.kron(rng.choice(few, (3, 3)), np.ones((height // 3 + 1, width // 3 + 1), dtype=int))[:height, :width]
    colours = np.random.default_rng(7).integers(0, 256, (classes, 3))
    image = (colours[mask] + rng.integers(-20, 20, (height, width, 3))).clip(0, 255).astype(np.uint8)
    return image, np.where(rng.random((height, width)) < 0.1, -1, mask)
