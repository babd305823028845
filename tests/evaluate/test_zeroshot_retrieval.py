"""Zero-shot and retrieval against loops in plain Python."""

import math

import pytest
import torch

from cgspn.data import fill, load_embedded
from cgspn.evaluate import class_embeddings, retrieve, top1
from cgspn.evaluate.measure import class_retrieval
from cgspn.evaluate.suite import embed_set
from cgspn.teachers import load_embedded_teacher


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cos(a, b):
    dot = sum(x * y for x, y in zip(a, b))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(x * x for x in b))


def test_class_embeddings_average_normalised_prompts():
    names, templates = ("bag", "orange"), ("a photo of a {}", "the {}")
    table = {fill(t, n): randn(5, seed=i) * 10**i for i, (n, t) in enumerate((n, t) for n in names for t in templates)}
    got = class_embeddings(lambda texts: torch.stack([table[t] for t in texts]), names, templates)
    for k, name in enumerate(names):
        parts = [table[fill(t, name)] for t in templates]
        mean = sum(p / p.norm() for p in parts) / 2
        torch.testing.assert_close(got[k], mean / mean.norm())


def test_top1_counts_as_a_loop_does():
    images, classes = randn(60, 7), randn(5, 7, seed=1) * torch.tensor([1, 50, 0.1, 1, 3])[:, None]
    labels = torch.arange(60) % 5
    right = 0
    for image, label in zip(images.tolist(), labels.tolist()):
        scores = [cos(image, c) for c in classes.tolist()]
        right += scores.index(max(scores)) == label
    assert top1(images, classes, labels) == pytest.approx(right / 60)
    assert top1(classes[labels] * 3, classes, labels) == 1.0


def rank_recall(queries, items, query_ids, item_ids, k):
    hits = 0
    for query, i in zip(queries.tolist(), query_ids.tolist()):
        order = sorted(range(len(items)), key=lambda n: -cos(query, items[n].tolist()))
        hits += any(item_ids[n] == i for n in order[:k])
    return hits / len(queries)


@pytest.mark.parametrize("seed", range(3))
def test_retrieval_counts_as_a_sorted_list_does(seed):
    # Seven captions, of which two say the same; 40 images that share them.
    image_ids = torch.arange(40) % 6
    text_ids = torch.tensor([0, 1, 2, 3, 4, 5, 5])
    images, texts = randn(40, 8, seed=seed), randn(7, 8, seed=seed + 10)
    images = images + 0.7 * texts[image_ids]
    got = retrieve(images, texts, image_ids, text_ids, ranks=(1, 2, 5))
    for k in (1, 2, 5):
        assert got.image_to_text[k] == pytest.approx(rank_recall(images, texts, image_ids, text_ids, k))
        assert got.text_to_image[k] == pytest.approx(rank_recall(texts, images, text_ids, image_ids, k))
    assert 0 < got.image_to_text[1] < got.image_to_text[5]


def test_retrieval_beyond_one_chunk():
    ids = torch.arange(1500)
    x = randn(1500, 64)
    shifted = retrieve(x, x.roll(1, 0), ids, ids)
    assert shifted.image_to_text[1] < 0.01
    perfect = retrieve(x, 2 * x, ids, ids)
    assert perfect.image_to_text == perfect.text_to_image == {1: 1.0, 5: 1.0}


def test_a_collapsed_model_finds_nothing():
    ids = torch.arange(20)
    got = retrieve(torch.ones(20, 4), torch.ones(20, 4), ids, ids)
    assert got.image_to_text == got.text_to_image == {1: 0.0, 5: 0.0}


@pytest.mark.parametrize("order", ["sorted by class", "classes in turns"])
def test_captions_look_for_their_images_among_other_classes_whatever_the_order_of_the_set(order):
    model, images = load_embedded_teacher(), load_embedded("test")
    images = images.subset(images.labels.argsort(stable=True) if order == "sorted by class" else torch.arange(4000))
    images = images.subset(torch.arange(0, 4000, 8))
    with torch.no_grad():
        for p in model.image.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    embeddings, _ = embed_set(model, images)
    spoilt = class_retrieval(model, embeddings, images.labels, images.class_names)
    assert spoilt["text_to_image"] < 0.4  # an image found by chance is right one time in ten


def test_wrong_arguments_are_named():
    x, ids = torch.ones(3, 2), torch.arange(3)
    with pytest.raises(ValueError, match="image_embeddings holds values that are not finite"):
        top1(x * float("nan"), x, ids)
    with pytest.raises(ValueError, match=r"labels run from 0 to 3; accepted: 0 to 2"):
        top1(torch.ones(4, 2), x, torch.arange(4))
    with pytest.raises(ValueError, match=r"labels has shape \(2,\)"):
        top1(x, x, ids[:2])
    with pytest.raises(TypeError, match="labels has dtype"):
        top1(x, x, ids.float())
    with pytest.raises(ValueError, match="text_embeddings has D = 3"):
        retrieve(x, torch.ones(3, 3), ids, ids)
    with pytest.raises(ValueError, match="image_ids holds 2, which the other side lacks"):
        retrieve(x, x[:2], ids, ids[:2])
    with pytest.raises(ValueError, match="encode_text returned 1 embeddings for 2 texts"):
        class_embeddings(lambda texts: torch.ones(1, 4), ("a", "b"), ("{}",))
    with pytest.raises(ValueError, match="0 templates"):
        class_embeddings(lambda texts: torch.ones(1, 4), ("a", "b"), ())
