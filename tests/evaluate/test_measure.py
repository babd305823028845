"""Data sets that stream, against what brute force gives on the same pictures."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

import cgspn
from cgspn.data import fill, load_embedded
from cgspn.data.labelled import open_captioned, open_labelled
from cgspn.data.segmentation_sets import open_segmentation
from cgspn.evaluate import retrieve, retrieve_captions, segment
from cgspn.evaluate.measure import (
    caption_retrieval,
    check_size,
    embed_pictures,
    segmentation,
    size_for,
    zeroshot,
)
from cgspn.evaluate.suite import embed_set
from cgspn.layers import AttentionConfig
from cgspn.models import Encoder, EncoderConfig
from layouts import ade20k, clip_benchmark, coco_stuff


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    heads = AttentionConfig(heads=2)
    config = EncoderConfig(
        image_size=(24, 24),
        patch_size=6,
        width=24,
        mixers=("attention",),
        mlp_hidden=24,
        attention=heads,
        pooling="mean",
    )
    return Encoder(config).eval()


def tokens_of(encoder, image, size):
    image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    pixels = (torch.tensor(np.asarray(image)).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        return encoder(pixels).tokens


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_streamed_segmentation_equals_the_probe_in_memory(tmp_path, encoder, batch_size):
    # pictures of one size, which fit into one tensor
    train, test = open_segmentation(ade20k(tmp_path, (12, 5), classes=20, sizes=((24, 36),)))
    seen = []
    found, skipped = segmentation(encoder, train, test, batch_size=batch_size, watch=seen.append)
    tokens, masks = [], []
    for part in (train, test):
        pairs = [part.read(i) for i in range(len(part))]
        tokens.append(torch.cat([tokens_of(encoder, image, (24, 36)) for image, _ in pairs]))
        masks.append(torch.stack([torch.from_numpy(mask) for _, mask in pairs]))
    expected = segment(tokens[0], masks[0], tokens[1], masks[1], 150, ignore_index=-1)
    assert found.penalty == expected.penalty
    assert found.mean_iou == pytest.approx(expected.mean_iou, abs=1e-4)
    assert found.pixel_accuracy == pytest.approx(expected.pixel_accuracy, abs=1e-4)
    assert found.mean_iou > 0.2
    assert sum(seen) == len(train) + len(test)
    assert not any(skipped)


@pytest.mark.parametrize("layout", ["ade20k", "coco-stuff"])
@pytest.mark.parametrize("size", [(), (30,), (36, 24)])
def test_measures_of_mixed_sizes_equal_counts_by_hand(tmp_path, encoder, layout, size):
    """The probe is solved in dense form from all patches, and pixels are counted by a loop over classes."""
    root = ade20k(tmp_path, classes=20) if layout == "ade20k" else coco_stuff(tmp_path)
    train, test = open_segmentation(root)
    found, _ = segmentation(encoder, train, test, size=size, batch_size=3)
    classes = len(train.class_names)
    xs, ys, ws = [], [], []
    for i in range(len(train)):
        image, mask = train.read(i)
        h, w = size_for(encoder.config, image.height, image.width, size)
        tokens = tokens_of(encoder, image, (h, w))[0].double()
        rows, columns = tokens.shape[:2]
        for r in range(rows):
            for c in range(columns):
                top, bottom = r * mask.shape[0] // rows, -(-(r + 1) * mask.shape[0] // rows)
                left, right = c * mask.shape[1] // columns, -(-(c + 1) * mask.shape[1] // columns)
                part = mask[top:bottom, left:right]
                counts = torch.tensor([(part == k).sum() for k in range(classes)], dtype=torch.float64)
                xs.append(tokens[r, c])
                ys.append(counts / max(counts.sum(), 1))
                ws.append(counts.sum() / part.size)
    x, y, weight = torch.stack(xs), torch.stack(ys), torch.stack(ws)
    weight = weight / weight.sum()
    center = weight @ x
    scale = (weight @ (x - center).square()).sqrt()
    design = torch.cat([(x - center) / scale, torch.ones(len(x), 1)], 1)
    regular = torch.diag(torch.tensor([found.penalty] * x.shape[1] + [0.0], dtype=torch.float64))
    solved = torch.linalg.solve(design.T @ (weight[:, None] * design) + regular, design.T @ (weight[:, None] * y))
    hits, unions, right, total = np.zeros(classes), np.zeros(classes), 0, 0
    for i in range(len(test)):
        image, mask = test.read(i)
        tokens = tokens_of(encoder, image, size_for(encoder.config, image.height, image.width, size)).double()
        logits = torch.cat([(tokens - center) / scale, torch.ones(*tokens.shape[:3], 1)], -1) @ solved
        full = interpolate(logits.permute(0, 3, 1, 2).float(), mask.shape, mode="bilinear")
        predicted = full[0].argmax(0).numpy()
        counted = mask >= 0
        right, total = right + ((predicted == mask) & counted).sum(), total + counted.sum()
        for k in range(classes):
            hits[k] += ((predicted == k) & (mask == k)).sum()
            unions[k] += (((predicted == k) | (mask == k)) & counted).sum()
    expected = [h / u if u else None for h, u in zip(hits, unions)]
    assert found.pixel_accuracy == pytest.approx(right / total, abs=2e-3)  # single pixels on the edge of two classes
    assert found.class_iou == pytest.approx(tuple(expected), abs=0.01)
    present = [v for v in expected if v is not None]
    assert found.mean_iou == pytest.approx(sum(present) / len(present), abs=5e-3)


def test_damaged_pictures_are_skipped_and_too_many_stop(tmp_path, encoder):
    train, test = open_segmentation(ade20k(tmp_path, (20, 2), classes=20))
    train.pairs[3][0].write_bytes(b"damaged")
    seen = []
    found, skipped = segmentation(encoder, train, test, watch=seen.append)
    assert sum(seen) == 22
    assert found.pixel_accuracy > 0.2
    assert [len(part) for part in skipped] == [1, 0]
    assert "ADE_00000003.png" in skipped[0].files[0][0]
    for _, mask in train.pairs:
        mask.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"ade20k \(train\): 3 of the 3 images"):
        segmentation(encoder, train, test)


def test_sizes_follow_the_picture_and_the_patch(encoder):
    assert size_for(encoder.config, 480, 640, ()) == (24, 30)
    assert size_for(encoder.config, 640, 480, (48,)) == (66, 48)
    assert size_for(encoder.config, 10, 3000, (12,)) == (12, 3600)
    assert size_for(encoder.config, 480, 640, (60, 66)) == (60, 66)
    with pytest.raises(ValueError, match=r"expected multiples of the patch size, 6"):
        check_size(encoder.config, (60, 64))
    with pytest.raises(ValueError, match="of 6 or more"):
        check_size(encoder.config, (5,))
    with pytest.raises(ValueError, match=r"size is 1200 x 72000 pixels; accepted: at most 67,108,864"):
        size_for(encoder.config, 10, 600, (1200,))


def test_zero_shot_on_shards_counts_as_a_loop_does(tmp_path):
    model, images = cgspn.load_model("embedded"), load_embedded("test")
    labels = images.labels[:60].tolist()
    pictures = [Image.fromarray(image[0].numpy()) for image in images.images[:60]]
    templates = ("a photo of a {c}.", "{c}")
    names = ["t-shirt", "owl", *images.class_names[2:]]
    root = clip_benchmark(tmp_path / "wds", pictures, labels, names, templates, per_shard=25)
    opened = open_labelled(root)
    embeddings, kept, skipped = embed_pictures(model, opened.pictures, "wds", batch_size=7)
    assert kept == list(range(60))
    assert not skipped
    found = zeroshot(model, opened, embeddings, kept)
    pixels = (images.images[:60].float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        image = model.encode_image(pixels.expand(-1, model.image.config.channels, -1, -1))
        classes = torch.stack([sum(model.encode_text([t.replace("{c}", n)])[0] for t in templates) for n in names])
    scores = (image @ (classes / classes.norm(dim=1, keepdim=True)).T).tolist()
    ranks = [sorted(range(10), key=lambda k: -row[k]).index(label) for row, label in zip(scores, labels)]
    assert found.top1 == pytest.approx(sum(r < 1 for r in ranks) / 60)
    assert found.top5 == pytest.approx(sum(r < 5 for r in ranks) / 60)
    by_class = [[r < 1 for r, label in zip(ranks, labels) if label == k] for k in range(10)]
    assert found.per_class == pytest.approx(sum(sum(c) / len(c) for c in by_class) / 10)
    assert 0.5 < found.top1 < 1


def test_classes_without_images_do_not_count_in_the_mean_over_classes():
    from cgspn.evaluate import accuracy

    classes = torch.eye(4)
    found = accuracy(torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0]]), classes, torch.tensor([0, 0, 1]))
    assert found.top1 == pytest.approx(2 / 3)
    assert found.per_class == pytest.approx(0.75)  # class 2 was predicted, but no image is of it


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_recall_equals_the_hit_rate_of_torchmetrics():
    from torchmetrics.retrieval import RetrievalHitRate

    image_ids, text_ids = torch.arange(30), torch.arange(90) // 3
    images, texts = randn(30, 8), randn(90, 8, seed=1)
    texts = texts + images[text_ids]
    found = retrieve(images, texts, image_ids, text_ids, ranks=(1, 5))
    scores = torch.nn.functional.normalize(images, dim=1) @ torch.nn.functional.normalize(texts, dim=1).T
    right = image_ids[:, None] == text_ids
    for k in (1, 5):
        metric = RetrievalHitRate(top_k=k)
        rows = torch.arange(30)[:, None].expand(30, 90)
        assert found.image_to_text[k] == pytest.approx(float(metric(scores.flatten(), right.flatten(), rows.flatten())))
        columns = torch.arange(90)[None].expand(30, 90)
        metric = RetrievalHitRate(top_k=k)
        assert found.text_to_image[k] == pytest.approx(
            float(metric(scores.flatten(), right.flatten(), columns.flatten()))
        )


def test_pairs_and_ids_agree_and_a_shared_caption_finds_either_image():
    image_ids, text_ids = torch.arange(2000), torch.arange(3000) % 2000
    images, texts = randn(2000, 16), randn(3000, 16, seed=1) + randn(2000, 16)[text_ids]
    pairs = torch.stack([text_ids, torch.arange(3000)], 1)
    by_ids, by_pairs = retrieve(images, texts, image_ids, text_ids), retrieve_captions(images, texts, pairs, (1, 5))
    assert by_ids == by_pairs
    assert 0.1 < by_ids.image_to_text[1] < 0.9
    shared = retrieve_captions(torch.eye(3)[:2], torch.eye(3), torch.tensor([[0, 0], [1, 0], [0, 1], [1, 2]]), (1,))
    assert shared.text_to_image[1] == pytest.approx(1 / 3)  # text 0 finds image 0; texts 1 and 2 tie or miss
    with pytest.raises(ValueError, match="pairs must hold each text from 0 to 2"):
        retrieve_captions(torch.eye(3)[:2], torch.eye(3), torch.tensor([[0, 0], [1, 1]]))


def test_retrieval_on_a_folder_with_several_captions(tmp_path):
    model = cgspn.load_model("embedded")
    images = load_embedded("test")
    texts = []
    for i in range(12):
        name = images.class_names[int(images.labels[i])]
        Image.fromarray(images.images[i, 0].numpy()).save(tmp_path / f"{i:02d}.png")
        texts.append([fill("a photo of a {}", name), f"{name} number {i}"])
        (tmp_path / f"{i:02d}.txt").write_text("\n".join(texts[-1]))
    (tmp_path / "damaged.png").write_bytes(b"no image")
    (tmp_path / "damaged.txt").write_text("never seen")
    opened = open_captioned(tmp_path)
    embeddings, kept, skipped = embed_pictures(model, opened.pictures, "folder")
    assert len(skipped) == 1
    found = caption_retrieval(model, opened, embeddings, kept)
    distinct = sorted({t for lines in texts for t in lines})
    with torch.no_grad():
        scores = embeddings @ model.encode_text(distinct).T
    hits = 0
    for i in range(12):
        right = [distinct.index(t) for t in texts[i]]
        best = max(float(scores[i, j]) for j in right)
        hits += sum(float(scores[i, j]) >= best for j in range(len(distinct)) if j not in right) < 1
    assert found.image_to_text[1] == pytest.approx(hits / 12)
    hits = 0
    for j, text in enumerate(distinct):
        right = [i for i in range(12) if text in texts[i]]
        best = max(float(scores[i, j]) for i in right)
        hits += sum(float(scores[i, j]) >= best for i in range(12) if i not in right) < 5
    assert found.text_to_image[5] == pytest.approx(hits / len(distinct))
    assert found.image_to_text[10] >= found.image_to_text[1]


def test_pictures_that_cannot_be_read_at_all(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a\.png"):
        embed_pictures(cgspn.load_model("embedded"), [tmp_path / "a.png"], "set")


def test_the_demo_and_eval_see_the_same_images():
    model = cgspn.load_model(
        "embedded", image_size=(32, 32), position_table=(7, 7)
    )  # not the images' own, so that they are resized
    few = open_labelled("embedded")
    embeddings, _, _ = embed_pictures(model, few.pictures[:40], "few")
    torch.testing.assert_close(embed_set(model, load_embedded("test").subset(torch.arange(40)))[0], embeddings)
