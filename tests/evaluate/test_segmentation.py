"""The linear probe against sets of pixels, a dense solve and problems with a known answer."""

import pytest
import torch
from torch.nn.functional import interpolate

from cgspn.evaluate import PixelScore, fit_probe, patch_histograms, segment
from cgspn.evaluate.probe import PENALTIES
from cgspn.evaluate.segmentation import fit_streamed, in_memory


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("ignore", [None, 9, -1])
def test_mean_iou_against_sets_of_pixels(ignore):
    target = torch.randint(0, 4, (3, 8, 9), generator=generator())  # class 4 of 5 occurs in neither
    prediction = torch.where(torch.rand(3, 8, 9, generator=generator(1)) < 0.6, target, 3 - target)
    if ignore is not None:
        target[torch.rand(3, 8, 9, generator=generator(2)) < 0.3] = ignore
    t, p = target.flatten().tolist(), prediction.flatten().tolist()
    pixels = [i for i in range(len(t)) if t[i] != ignore]
    expected = []
    for k in range(5):
        is_target, is_prediction = {i for i in pixels if t[i] == k}, {i for i in pixels if p[i] == k}
        union = is_target | is_prediction
        expected.append(len(is_target & is_prediction) / len(union) if union else None)
    score = PixelScore(5, ignore)
    for part in range(3):
        score.update(prediction[part], target[part])
    mean, each, accuracy = score.compute()
    assert accuracy == pytest.approx(sum(t[i] == p[i] for i in pixels) / len(pixels))
    assert each == pytest.approx(tuple(expected))
    assert each[4] is None
    assert mean == pytest.approx(sum(expected[:4]) / 4)


@pytest.mark.parametrize(("size", "grid"), [((8, 12), (2, 3)), ((10, 7), (3, 4)), ((2, 3), (4, 5))])
def test_patch_histograms_count_pixels(size, grid):
    masks = torch.randint(0, 3, (2, *size), generator=generator(), dtype=torch.uint8)
    masks[torch.rand(2, *size, generator=generator(1)) < 0.3] = 255
    shares, counted = patch_histograms(masks, grid, 3, ignore_index=255)
    (H, W), (h, w) = size, grid
    for n in range(2):
        for i in range(h):
            for j in range(w):
                rows = range(i * H // h, -(-(i + 1) * H // h))
                columns = range(j * W // w, -(-(j + 1) * W // w))
                inside = [int(masks[n, r, c]) for r in rows for c in columns]
                valid = [v for v in inside if v != 255]
                assert float(counted[n, i, j]) == pytest.approx(len(valid) / len(inside), abs=1e-6)
                for k in range(3):
                    share = valid.count(k) / len(valid) if valid else 0.0
                    assert float(shares[n, i, j, k]) == pytest.approx(share, abs=1e-6)


def test_ridge_against_a_dense_solve():
    n, h, w, c, k, penalty = 140, 3, 2, 6, 4, 0.05  # more images than one chunk
    tokens = torch.randn(n, h, w, c, generator=generator()) * torch.tensor([1, 10, 0.1, 1, 1, 1]) + 3
    masks = torch.randint(0, k, (n, 7, 9), generator=generator(1))
    masks[torch.rand(n, 7, 9, generator=generator(2)) < 0.2] = 255
    probe = fit_probe(tokens, masks, k, ignore_index=255, penalties=(penalty,))
    # The same problem as one system of equations: features scaled to weighted variance 1, bias not penalised.
    shares, counted = patch_histograms(masks, (h, w), k, 255)
    x, y, weight = tokens.flatten(0, 2).double(), shares.flatten(0, 2).double(), counted.flatten().double()
    weight = weight / weight.sum()
    center = weight @ x
    scale = (weight @ (x - center).square()).sqrt()
    design = torch.cat([(x - center) / scale, torch.ones(len(x), 1)], 1)
    regular = torch.diag(torch.tensor([penalty] * c + [0.0], dtype=torch.float64))
    solved = torch.linalg.solve(design.T @ (weight[:, None] * design) + regular, design.T @ (weight[:, None] * y))
    expected = design @ solved
    torch.testing.assert_close(probe.logits(tokens.double()).flatten(0, 2), expected, atol=1e-9, rtol=1e-7)


def blocks_of_classes(n, grid, classes, seed):
    """Token classes at random, masks four pixels to a token."""
    labels = torch.randint(0, classes, (n, *grid), generator=generator(seed))
    return labels, labels.repeat_interleave(4, 1).repeat_interleave(4, 2)


def test_tokens_that_tell_the_class_are_read_perfectly_and_noise_is_not():
    codes = torch.randn(3, 16, generator=generator())
    # One class per image, so that the upsampling has no edges to blur.
    train, test = torch.arange(30) % 3, torch.arange(12) % 3
    tokens = [
        codes[k][:, None, None].expand(-1, 5, 6, -1) + 0.01 * torch.randn(len(k), 5, 6, 16) for k in (train, test)
    ]
    masks = [k[:, None, None].expand(-1, 20, 24).contiguous() for k in (train, test)]
    result = segment(tokens[0], masks[0], tokens[1], masks[1], 3)
    assert result.mean_iou == result.pixel_accuracy == 1.0
    noise = segment(torch.randn(30, 5, 6, 16), masks[0], torch.randn(12, 5, 6, 16), masks[1], 3)
    assert noise.mean_iou < 0.4


def test_prediction_is_the_argmax_of_upsampled_logits():
    labels, masks = blocks_of_classes(20, (4, 5), 3, 0)
    tokens = torch.nn.functional.one_hot(labels, 3).float() + 0.2 * torch.randn(20, 4, 5, 3, generator=generator(3))
    probe = fit_probe(tokens, masks, 3)
    logits = tokens @ probe.weight.float() + probe.bias.float()
    expected = interpolate(logits.permute(0, 3, 1, 2), (16, 20), mode="bilinear").argmax(1)
    assert torch.equal(probe.predict(tokens, (16, 20)), expected)
    # At the centre pixels of a patch the patch itself decides.
    middle = probe.predict(tokens, (4, 5))
    assert (middle == labels).float().mean() > 0.95


def test_the_penalty_is_chosen_by_held_out_images():
    # 150 channels of noise, a faint signal, few images: without regularisation the probe reads the noise.
    labels, masks = blocks_of_classes(24, (3, 3), 2, 0)
    signal = (labels * 2 - 1).float()[..., None]
    tokens = torch.cat([signal * 0.7, torch.zeros(24, 3, 3, 149)], -1) + torch.randn(
        24, 3, 3, 150, generator=generator(4)
    )
    test_labels, test_masks = blocks_of_classes(60, (3, 3), 2, 1)
    test = torch.cat([(test_labels * 2 - 1).float()[..., None] * 0.7, torch.zeros(60, 3, 3, 149)], -1)
    test = test + torch.randn(60, 3, 3, 150, generator=generator(5))

    def quality(probe):
        score = PixelScore(2)
        score.update(probe.predict(test, (12, 12)), test_masks)
        return score.compute()[0]

    chosen = fit_probe(tokens, masks, 2, penalties=(1e-9, 1e-3, 1.0))
    assert chosen.penalty == 1.0
    assert quality(chosen) > quality(fit_probe(tokens, masks, 2, penalties=(1e-9,))) + 0.02
    assert torch.equal(chosen.weight, fit_probe(tokens, masks, 2, penalties=(1e-9, 1e-3, 1.0)).weight)


def noisy_images(n, seed=0, ignored=0.2):
    """Tokens [n, 4, 4, 12] that tell three classes faintly, and masks [n, 16, 16] with ignored pixels."""
    labels, masks = blocks_of_classes(n, (4, 4), 3, seed)
    signal = torch.nn.functional.one_hot(labels, 12).float()
    tokens = 0.5 * signal + torch.randn(n, 4, 4, 12, generator=generator(seed + 1))
    masks[torch.rand(masks.shape, generator=generator(seed + 2)) < ignored] = 255
    return tokens, masks


def iou_by_loops(tokens, masks, folds, penalty, scored):
    """Mean IoU of patches that probes of the other folds classify, for folds of the documented fixed shuffle."""
    order = torch.randperm(len(tokens), generator=generator()).tolist()
    counts = torch.zeros(3, 3, dtype=torch.float64)  # predicted, present
    for first in range(folds):
        out = order[first::folds]
        kept = [i for i in range(len(tokens)) if i not in out]
        probe = fit_probe(tokens[kept], masks[kept], 3, ignore_index=255, penalties=(penalty,))
        fractions, counted = patch_histograms(masks[out], (4, 4), 3, 255)
        for k in range(3):
            predicted = probe.logits(tokens[out]).argmax(-1) == k
            counts[k] += (fractions * counted[..., None])[predicted].double().sum(0)
    both = counts.diag()
    iou = both / (counts.sum(0) + counts.sum(1) - both)
    return float(iou[list(scored)].mean())


@pytest.mark.parametrize(("n", "folds", "scored"), [(2, 2, ()), (7, 3, ()), (12, 5, (2,)), (9, 4, (0, 1))])
def test_the_penalty_has_the_best_iou_on_left_out_folds(n, folds, scored):
    penalties = tuple(10.0 ** (e / 2) for e in range(-6, 3))
    for seed in range(3):
        tokens, masks = noisy_images(n, 10 * seed)
        read = in_memory(tokens, masks)
        probe = fit_streamed(read, n, 3, ignore_index=255, penalties=penalties, folds=folds, scored=scored)
        by_loops = [iou_by_loops(tokens, masks, folds, penalty, scored or range(3)) for penalty in penalties]
        best = [p for p, iou in zip(penalties, by_loops) if iou > max(by_loops) - 1e-9]
        assert probe.penalty == best[-1]
        whole = fit_probe(tokens, masks, 3, ignore_index=255, penalties=(probe.penalty,))
        torch.testing.assert_close(probe.weight, whole.weight)


def test_a_class_that_does_not_occur_does_not_change_the_choice():
    tokens, masks = noisy_images(12)
    chosen = fit_probe(tokens, masks, 3, ignore_index=255).penalty
    assert fit_probe(tokens, masks, 9, ignore_index=255).penalty == chosen


def test_folds_without_valid_pixels_are_left_out():
    tokens, masks = noisy_images(5)
    first = int(torch.randperm(5, generator=generator())[0])
    masks[first] = 255
    probe = fit_probe(tokens, masks, 3, ignore_index=255)
    others = [i for i in range(5) if i != first]
    same = fit_probe(tokens[others], masks[others], 3, ignore_index=255, penalties=(probe.penalty,))
    torch.testing.assert_close(probe.weight, same.weight)
    masks[others[1:]] = 255  # a single image is left, and nothing to choose by
    assert fit_probe(tokens, masks, 3, ignore_index=255).penalty == max(PENALTIES)


def test_each_image_is_read_once_and_unreadable_ones_may_be_missing():
    tokens, masks = noisy_images(12)
    seen = []

    def read(numbers):
        seen.extend(numbers)
        yield from ((tokens[[n]], masks[[n]]) for n in numbers if n not in (3, 4))

    kept = [n for n in range(12) if n not in (3, 4)]
    probe = fit_streamed(read, 12, 3, ignore_index=255)
    assert sorted(seen) == list(range(12))
    same = fit_probe(tokens[kept], masks[kept], 3, ignore_index=255, penalties=(probe.penalty,))
    torch.testing.assert_close(probe.weight, same.weight)


def test_ignored_pixels_have_no_effect():
    labels, masks = blocks_of_classes(20, (4, 4), 3, 0)
    tokens = torch.nn.functional.one_hot(labels, 3).float() + torch.randn(20, 4, 4, 3, generator=generator(6))
    masks[:, :8] = 11
    first = segment(tokens, masks, tokens, masks, 3, ignore_index=11)
    tokens[:, :2] = 1000.0  # the tokens of ignored patches; no held-out pixel near them either
    probe = fit_probe(tokens, masks, 3, ignore_index=11, penalties=(first.penalty,))
    tokens[:, :2] = 0.0
    again = fit_probe(tokens, masks, 3, ignore_index=11, penalties=(first.penalty,))
    torch.testing.assert_close(probe.weight, again.weight)
    assert sum(v is not None for v in first.class_iou) == 3


def test_wrong_arguments_are_named():
    tokens, masks = torch.zeros(2, 3, 3, 4), torch.zeros(2, 6, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"masks holds class 7; accepted: 0 to 2"):
        fit_probe(tokens, masks + 7, 3)
    with pytest.raises(TypeError, match=r"masks has dtype torch\.float32"):
        fit_probe(tokens, masks.float(), 3)
    with pytest.raises(ValueError, match="only ignore_index = 5"):
        fit_probe(tokens, masks + 5, 3, ignore_index=5)
    with pytest.raises(ValueError, match=r"masks has shape \(1, 6, 6\)"):
        fit_probe(tokens, masks[:1], 3)
    with pytest.raises(ValueError, match="tokens holds values that are not finite"):
        fit_probe(tokens / 0, masks, 3)
    with pytest.raises(ValueError, match="folds is 1; expected at least 2"):
        fit_probe(tokens, masks, 3, folds=1)
    with pytest.raises(ValueError, match="has 1 image to be fitted on"):
        fit_probe(tokens[:1], masks[:1], 3)
    with pytest.raises(ValueError, match=r"scored holds \[-1\]; accepted: classes 0 to 2"):
        fit_streamed(in_memory(tokens, masks), 2, 3, scored=(-1,))
    with pytest.raises(ValueError, match="prediction has shape"):
        PixelScore(3).update(masks, masks[:1])


def test_scored_classes_make_the_mean_and_the_others_still_compete():
    target = torch.tensor([[0, 0, 1, 2, 255, 3]])
    prediction = torch.tensor([[0, 1, 1, 2, 0, 2]])
    every, some = PixelScore(5, 255), PixelScore(5, 255, scored=(0, 2, 4))
    for score in (every, some):
        score.update(prediction, target)
    mean, each, accuracy = every.compute()
    assert mean == pytest.approx((0.5 + 0.5 + 0.5 + 0) / 4)
    assert some.compute()[0] == pytest.approx(0.5)  # class 4 occurs nowhere
    assert (each, accuracy) == some.compute()[1:]
    with pytest.raises(ValueError, match=r"scored holds \[5\]; accepted: classes 0 to 4"):
        PixelScore(5, scored=(5,))
    lonely = PixelScore(5, 255, scored=(4,))
    lonely.update(prediction, target)
    with pytest.raises(ValueError, match=r"none of the scored classes \[4\] occurs"):
        lonely.compute()
