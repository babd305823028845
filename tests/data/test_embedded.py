"""The embedded set holds what it says, and captions and masks follow from it."""

from collections import deque

import pytest
import torch

from cgspn.data import TEMPLATES, ImageSet, fill, load_embedded
from cgspn.data.foreground import foreground

SIZES = {"train": 19_200, "validation": 2_000, "test": 4_000}


@pytest.mark.parametrize("split", SIZES)
def test_sizes_balance_and_decoding(split):
    images = load_embedded(split)
    assert images.images.shape == (SIZES[split], 1, 28, 28)
    # Balanced as a whole and in any prefix, which is what a quick run takes.
    assert torch.bincount(images.labels).tolist() == [SIZES[split] // 10] * 10
    assert torch.bincount(images.labels[:200]).tolist() == [20] * 10
    assert load_embedded(split) is images


def test_images_stand_upright_and_carry_the_right_labels():
    # Stored column by column, so a wrong axis order is the mistake to fear. Trousers are tall, sneakers wide.
    images = load_embedded("validation")
    bright = images.images[:, 0].float() > 64
    rows, columns = bright.any(2).sum(1).float(), bright.any(1).sum(1).float()
    trouser, sneaker = images.labels == 1, images.labels == 7
    assert images.class_names[1] == "trouser"
    assert images.class_names[7] == "sneaker"
    assert rows[trouser].mean() > 1.5 * columns[trouser].mean()
    assert columns[sneaker].mean() > 1.5 * rows[sneaker].mean()
    # Soles are at the bottom: a sneaker has more of itself in the lower half.
    assert bright[sneaker][:, 14:].sum() > 1.2 * bright[sneaker][:, :14].sum()


def test_splits_share_no_image():
    seen = [{bytes(i.flatten().tolist()) for i in load_embedded(s).images[::4]} for s in ("validation", "test")]
    train = {bytes(i) for i in load_embedded("train").images.flatten(1).numpy()}
    # Fashion-MNIST itself holds a few images twice, in both of its splits.
    assert len(seen[0] & train) <= 1
    assert len(seen[1] & train) <= 1


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match=r"split is 'val'; accepted: 'train', 'validation', 'test'"):
        load_embedded("val")


def test_captions_follow_label_seed_and_index():
    images = load_embedded("validation")
    captions = images.captions(seed=3)
    names = sorted(images.class_names, key=len, reverse=True)  # "t-shirt" before "shirt"
    for caption, label in zip(captions, images.labels.tolist()):
        assert next(n for n in names if caption.endswith(n)) == images.class_names[label]
    assert captions == images.captions(seed=3)
    assert captions != images.captions(seed=4)
    some = torch.tensor([1999, 7, 7, 0])
    assert images.captions(seed=3, indices=some) == [captions[i] for i in some.tolist()]
    used = {
        t for t in TEMPLATES for k, c in zip(images.labels.tolist(), captions) if c == fill(t, images.class_names[k])
    }
    assert used == set(TEMPLATES)


@pytest.mark.parametrize(
    ("template", "name", "text"),
    [
        ("a photo of a {}", "bag", "a photo of a bag"),
        ("a photo of a {}", "ankle boot", "a photo of an ankle boot"),
        ("a {}", "ankle boot", "an ankle boot"),
        ("the {} of an era", "orange", "the orange of an era"),
    ],
)
def test_fill_finds_the_article(template, name, text):
    assert fill(template, name) == text


def test_fill_refuses_a_template_without_a_place():
    with pytest.raises(ValueError, match="exactly one"):
        fill("a photo", "bag")


def flood(image, threshold):
    """Foreground by a queue from the border, one pixel at a time."""
    h, w = len(image), len(image[0])
    seen = [[False] * w for _ in range(h)]
    queue = deque((i, j) for i in range(h) for j in range(w) if i in (0, h - 1) or j in (0, w - 1))
    while queue:
        i, j = queue.popleft()
        if not (0 <= i < h and 0 <= j < w) or seen[i][j] or image[i][j] > threshold:
            continue
        seen[i][j] = True
        queue.extend([(i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)])
    return [[not s for s in row] for row in seen]


def test_foreground_against_a_queue():
    images = load_embedded("test").images[:30]
    noise = (torch.rand(20, 1, 17, 9, generator=torch.Generator().manual_seed(0)) < 0.5).to(torch.uint8) * 255
    for batch in (images, noise):
        got = foreground(batch, 16).tolist()
        assert got == [flood(image[0].tolist(), 16) for image in batch]


def test_foreground_follows_a_spiral_and_fills_a_ring():
    spiral = [
        "#######",
        "......#",
        "#####.#",
        "#...#.#",
        "#.###.#",
        "#.....#",
        "#######",
    ]
    ring = [".......", ".#####.", ".#...#.", ".#...#.", ".#####.", ".......", "......."]
    image = torch.tensor([[[255 if c == "#" else 0 for c in row] for row in s] for s in (spiral, ring)])
    got = foreground(image[:, None].to(torch.uint8))
    assert torch.equal(got[0], image[0] > 0)
    assert got[1].sum() == 20
    assert got[1, 1:5, 1:6].all()


def test_masks_hold_label_plus_one():
    images = load_embedded("validation").subset(torch.arange(100))
    masks = images.masks()
    assert masks.dtype == torch.uint8
    for mask, label in zip(masks, images.labels.tolist()):
        assert set(mask.unique().tolist()) == {0, label + 1}
    share = (masks > 0).float().mean((1, 2))
    assert share.min() > 0.03
    assert share.max() < 0.95


@pytest.mark.parametrize(
    ("images", "labels", "error"),
    [
        (torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64), TypeError),
        (torch.zeros(2, 2, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), ValueError),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), ValueError),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), ValueError),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2), TypeError),
    ],
)
def test_image_set_checks_what_it_is_given(images, labels, error):
    with pytest.raises(error, match=r"images|labels"):
        ImageSet(images, labels, ("one",))
