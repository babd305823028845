"""Linear and nearest-neighbour accuracy against brute force, and on pictures at other sizes."""

import io

import pytest
import torch
from PIL import Image

from cgspn.data import open_shards
from cgspn.data.labelled import LabelledPictures, images_of
from cgspn.evaluate import linear_accuracy, nearest_accuracy, recognition
from cgspn.evaluate.recognition import PENALTIES, picture_features
from cgspn.layers import AttentionConfig
from cgspn.models import Encoder, EncoderConfig
from layouts import write_tar


def blobs(count, classes=4, width=6, spread=0.4, seed=0):
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    return centres[labels] + spread * torch.randn(count, width, generator=generator), labels


def ridge(train, labels, test, penalty):
    """By the normal equations, features scaled to variance 1."""
    x, y = train.double(), torch.nn.functional.one_hot(labels).double()
    mean, std = x.mean(0), x.std(0, correction=0)
    x, asked = (x - mean) / std, (test.double() - mean) / std
    gram = x.T @ x + len(x) * penalty * torch.eye(x.shape[1])
    return asked @ torch.linalg.solve(gram, x.T @ (y - y.mean(0))) + y.mean(0)


def test_linear_accuracy_is_a_ridge_whose_penalty_leaves_each_out_in_turn():
    (train, labels), (test, truth) = blobs(40, spread=1.2), blobs(200, spread=1.2, seed=1)
    shares = {}
    for penalty in PENALTIES:
        found = 0
        for i in range(len(train)):
            others = torch.arange(len(train)) != i
            # scaling and centring are those of the whole set, as in the closed form
            x = (train.double() - train.double().mean(0)) / train.double().std(0, correction=0)
            one, rest = torch.cat([torch.ones(len(x), 1), x], 1), others
            y = torch.nn.functional.one_hot(labels).double()
            keep = torch.diag(torch.tensor([0.0] + [1.0] * x.shape[1]).double()) * len(x) * penalty
            weight = torch.linalg.solve(one[rest].T @ one[rest] + keep, one[rest].T @ y[rest])
            found += int((one[i] @ weight).argmax() == labels[i])
        shares[penalty] = found
    best = max(shares, key=lambda penalty: (shares[penalty], penalty))
    expected = (ridge(train, labels, test, best).argmax(1) == truth).double().mean()
    assert linear_accuracy(train, labels, test, truth) == pytest.approx(float(expected))
    assert linear_accuracy(train, labels, test, truth, [1e-3]) == pytest.approx(
        float((ridge(train, labels, test, 1e-3).argmax(1) == truth).double().mean())
    )


def test_a_linear_map_of_the_features_changes_no_scale_and_dead_channels_do_no_harm():
    (train, labels), (test, truth) = blobs(60), blobs(100, seed=1)
    plain = linear_accuracy(train, labels, test, truth)
    assert plain > 0.9
    scale, dead = torch.tensor([1e-2, 1, 10, 100, 1e3, 5]), torch.ones(1, 1)
    scaled = [torch.cat([t * scale + 0.1, dead.expand(len(t), 1)], 1) for t in (train, test)]
    assert linear_accuracy(scaled[0], labels, scaled[1], truth) == plain


def test_nearest_accuracy_is_the_vote_of_the_nearest():
    (train, labels), (test, truth) = blobs(40, spread=1.0), blobs(50, spread=1.0, seed=1)
    found = 0
    for point, own in zip(test, truth, strict=True):
        cosine = torch.cosine_similarity(point[None].double(), train.double())
        near = cosine.argsort(descending=True)[:5]
        votes = [(cosine[near][labels[near] == k] / 0.07).exp().sum() for k in range(4)]
        found += int(torch.stack(votes).argmax() == own)
    assert nearest_accuracy(train, labels, test, truth, neighbours=5) == pytest.approx(found / 50)
    assert nearest_accuracy(train, labels, train, labels, neighbours=1) == 1


@pytest.mark.parametrize("measure", [linear_accuracy, nearest_accuracy])
def test_wrong_arguments_are_named(measure):
    train, labels = blobs(8)
    with pytest.raises(ValueError, match=r"test has C = 5; expected that of train, 6"):
        measure(train, labels, train[:, :5], labels)
    with pytest.raises(ValueError, match="train_labels holds -1"):
        measure(train, labels - 1, train, labels)
    with pytest.raises(TypeError, match="test_labels has dtype"):
        measure(train, labels, train, labels.float())
    with pytest.raises(ValueError, match="train holds values that are not finite"):
        measure(train / 0, labels, train, labels)


def tar_of(path, count, broken=()):
    contents = {}
    for i in range(count):
        out = io.BytesIO()
        Image.new("RGB", (30, 20), [(250, 20, 20), (20, 250, 20), (20, 20, 250)][i % 3]).save(out, "PNG")
        contents |= {f"{i:03d}.png": b"no" if i in broken else out.getvalue(), f"{i:03d}.cls": str(i % 3).encode()}
    write_tar(path, contents)
    return path


def numbered(tar, count):
    pictures = images_of(open_shards(str(tar), tar.parent / "cache"))
    return LabelledPictures(tar.stem, pictures, [i % 3 for i in range(count)], ("red", "green", "blue"))


def test_pictures_of_tars_are_recognised_at_a_size_of_choice(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    config = EncoderConfig(
        image_size=(8, 8),
        patch_size=4,
        width=12,
        mixers=("attention",),
        mlp_hidden=12,
        attention=AttentionConfig(heads=2),
        pooling="mean",
    )
    encoder = Encoder(config).eval()
    train = numbered(tar_of(tmp_path / "train.tar", 12), 12)
    test = numbered(tar_of(tmp_path / "test.tar", 9, broken=(4,)), 9)
    for size in (None, 12, (8, 16)):
        found = recognition(encoder, train, test, size=size, max_skipped=0.5)
        assert (found.linear, found.nearest) == (1, 1)
    features, kept, skipped = picture_features(encoder, test, size=12, pooled=True, max_skipped=0.5)
    assert features.shape == (8, 24)
    assert kept == [0, 1, 2, 3, 5, 6, 7, 8]
    assert len(skipped) == 1
    with pytest.raises(
        ValueError, match=r"size is 10; accepted: multiples of the patch size 4, the nearest being 8 x 8"
    ):
        recognition(encoder, train, test, size=10)
