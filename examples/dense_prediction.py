"""Dense prediction at 1036 px: a feature pyramid and a segmentation head on a student, fitted to CamVid or your pairs.

    python examples/dense_prediction.py --student runs/student --data camvid/        # camvid-train.tar, camvid-test.tar
    python examples/dense_prediction.py --student runs/student --train 'shards/train-*.tar' --test test.tar --classes 21
    python examples/dense_prediction.py --size 112 --steps 60                         # drawn shapes, a laptop

The encoder is frozen unless --tune is given. Images keep their aspect ratio: --size is the longer side in pixels.
"""

import argparse
import math
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

import cgspn
from cgspn.data.segmentation_sets import IGNORE, SegmentationSet, open_pairs, open_segmentation
from cgspn.evaluate import PixelScore
from cgspn.models import FeaturePyramid

Pair = tuple[Image.Image, np.ndarray]


class Segmenter(nn.Module):
    """Images [B, 3, H, W] to logits [B, classes, H, W]: levels of the pyramid, added up at the finest stride."""

    def __init__(self, encoder: cgspn.Encoder, classes: int, channels: int = 128) -> None:
        super().__init__()
        self.pyramid = FeaturePyramid(encoder, channels)
        self.head = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.GELU(), nn.Conv2d(channels, classes, 1)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Any height and width."""
        maps = list(self.pyramid(images).values())
        finest = maps[0].shape[-2:]
        merged = sum(interpolate(level, finest, mode="bilinear") for level in maps)
        return interpolate(self.head(merged), images.shape[-2:], mode="bilinear")


class Drawn:
    """Pairs made up on the spot: a bright disc (1) and a dark square (2) on a noisy ground (0)."""

    class_names = ("ground", "disc", "square")

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def read(self, number: int) -> Pair:
        """A picture of 96 x 72 pixels and its mask."""
        random = np.random.default_rng((self.seed, number))
        image = Image.fromarray(random.integers(60, 190, (72, 96, 3), dtype=np.uint8))
        mask = Image.new("L", image.size)
        for label, (shape, colour) in enumerate((("ellipse", (250, 240, 200)), ("rectangle", (15, 20, 40))), start=1):
            x, y, side = random.integers(0, 64), random.integers(0, 40), random.integers(20, 32)
            box = (x, y, x + side, y + side)
            getattr(ImageDraw.Draw(image), shape)(box, fill=colour)
            getattr(ImageDraw.Draw(mask), shape)(box, fill=label)
        return image, np.asarray(mask, dtype=np.int64)


def prepared(pair: Pair, size: int, config: cgspn.models.EncoderConfig) -> tuple[Tensor, Tensor]:
    """Pixels [1, 3, h, w] with the longer side `size`, normalised; the mask [1, H, W] as it is."""
    image, mask = pair
    scale = size / max(image.size)
    image = image.convert("RGB").resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
    )
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.image_mean, config.image_std))
    return ((pixels - mean) / std)[None], torch.from_numpy(mask)[None]


def endless(count: int) -> Iterator[int]:
    """Numbers below `count`, shuffled anew in every epoch."""
    while True:
        yield from torch.randperm(count).tolist()


def main(arguments: list[str] | None = None) -> float:
    """Returns the mean intersection over union on the test part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", help="checkpoint of any encoder; a small random one if left out")
    parser.add_argument("--data", help="folder of CamVid, ADE20K or COCO-Stuff; drawn shapes if left out")
    parser.add_argument("--train", help="tars or a folder of NAME.jpg and NAME.mask.png instead")
    parser.add_argument("--test", help="the same, to test on")
    parser.add_argument("--classes", type=int, help="of --train and --test")
    parser.add_argument("--size", type=int, default=1036)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--accumulate", type=int, default=4, help="images of a step, one after the other")
    parser.add_argument("--limit", type=int, help="test images, evenly spaced; all if left out")
    parser.add_argument("--tune", action="store_true", help="train the encoder too")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    train: SegmentationSet | Drawn
    test: SegmentationSet | Drawn
    if options.data:
        train, test = open_segmentation(options.data)
    elif options.train:
        train, test = (open_pairs(source, options.classes) for source in (options.train, options.test))
    else:
        train, test = Drawn(200, seed=0), Drawn(20, seed=1)
    small = {"mixers": ("propagation",) * 2, "image_size": (112, 112)}
    encoder = (
        cgspn.load_encoder(options.student)
        if options.student
        else cgspn.create_model("cgspn_tiny_patch14_378", **small)
    )
    encoder.requires_grad_(options.tune or not options.student)
    model = Segmenter(encoder, len(train.class_names)).to(device)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=options.steps)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    numbers = endless(len(train))
    for step in range(options.steps):
        for _ in range(options.accumulate):
            pixels, mask = prepared(train.read(next(numbers)), options.size, encoder.config)
            with autocast:
                logits = interpolate(model(pixels.to(device)), mask.shape[-2:], mode="bilinear")
            loss = cross_entropy(logits.float(), mask.to(device), ignore_index=IGNORE)
            (loss / options.accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % max(1, options.steps // 10) == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    chosen = range(0, len(test), math.ceil(len(test) / (options.limit or len(test))))
    score = PixelScore(len(train.class_names), IGNORE, device)
    with torch.inference_mode(), autocast:
        for number in chosen:
            pixels, mask = prepared(test.read(number), options.size, encoder.config)
            logits = interpolate(model(pixels.to(device)), mask.shape[-2:], mode="bilinear")
            score.update(logits.argmax(1), mask.to(device))
    mean, each, accuracy = score.compute()
    for name, value in zip(train.class_names, each, strict=True):
        print(f"  {name}: {'-' if value is None else format(value, '.1%')}")
    print(f"{len(chosen)} images at {options.size} px: mIoU {mean:.1%}, pixel accuracy {accuracy:.1%}")
    return mean


if __name__ == "__main__":
    main()
