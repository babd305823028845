"""Images of different sizes in one batch: each gets what it gets alone, gradients included, whatever pads it."""

import math
from dataclasses import replace

import pytest
import torch

from cgspn.layers import GSPN, AttentionConfig, PropagationConfig
from cgspn.models import Encoder, EncoderConfig, choose_shapes, encode_variable_size, pack

BASE = EncoderConfig(
    image_size=(16, 20),
    patch_size=4,
    width=24,
    mixers=("attention",) * 2,
    mlp_hidden=32,
    attention=AttentionConfig(heads=2),
    propagation=PropagationConfig(4),
)
CGSPN = replace(BASE, mixers=("propagation",) * 2, positions=False)
CONFIGS = {
    "vit": BASE,
    "antialias": replace(BASE, position_resize="bicubic_antialias", pooling="mean"),
    "bilinear": replace(BASE, position_resize="bilinear_antialias", pool_norm=True),
    "clip": replace(BASE, class_token=True, pooling="cls", pre_norm=True, patch_bias=False, embed_dim=8),
    "registers": replace(BASE, class_token=True, registers=2, layer_scale=0.5, pooling="map"),
    "cgspn": CGSPN,
    "cgspn mean": replace(CGSPN, pooling="mean", propagation=PropagationConfig(4, merge="sum", local_kernel=5)),
    "gspn": replace(CGSPN, propagation=GSPN),
    "hybrid": replace(CGSPN, mixers=("propagation", "attention")),
    "windows": replace(BASE, mixers=("window_attention", "window_attention"), window=(2, 3)),
    "cropping": replace(BASE, crop_remainder=True),
}
# squares, the native size, one patch, one patch wide or high, extreme aspect ratios, one much larger than the rest
SIZES = [(16, 20), (8, 8), (4, 4), (4, 40), (36, 4), (12, 28), (8, 8), (64, 48)]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def awake(config):
    """An encoder whose every weight matters: fresh ones end their sub-layers near zero."""
    torch.manual_seed(0)
    encoder = Encoder(config)
    with torch.no_grad():
        for p in encoder.parameters():
            p.copy_(torch.randn_like(p) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3))
    return encoder


def pictures(config, sizes=SIZES):
    torch.manual_seed(1)
    extra = 3 if config.crop_remainder else 0
    return [torch.randn(3, h + extra, w + extra // 3).requires_grad_() for h, w in sizes]


def loss(outputs):
    """A scalar that weighs every value differently, so that no gradient cancels."""
    total = 0.0
    for tokens, pooled in outputs:
        total = total + (tokens * tokens.detach().cos()).sum() + pooled.square().sum()
    return total


def gradients(encoder, images, outputs):
    weights = dict(encoder.named_parameters())
    grads = torch.autograd.grad(loss(outputs), [*weights.values(), *images])
    return dict(zip([*weights, *(f"image {i}" for i in range(len(images)))], grads, strict=True))


@pytest.mark.parametrize("method", ["bucket", "pad"])
@pytest.mark.parametrize("name", CONFIGS)
def test_each_image_gets_what_it_gets_alone(name, method):
    encoder, images = awake(CONFIGS[name]), pictures(CONFIGS[name])
    alone = [encoder(image[None]) for image in images]
    mixed = encoder.forward_variable_size(images, method=method, max_shapes=3)
    for one, other in zip(mixed, alone, strict=True):
        assert one.tokens.shape == other.tokens.shape[1:]
        assert relative(one.tokens, other.tokens[0]) < 1e-5
        assert relative(one.pooled, other.pooled[0]) < 1e-5
    expected = gradients(encoder, images, [(out.tokens[0], out.pooled[0]) for out in alone])
    largest = max(grad.norm() for key, grad in expected.items() if not key.startswith("image"))
    for key, grad in gradients(encoder, images, mixed).items():
        # a key's bias has no gradient but rounding: beside it the largest of the encoder's is what counts
        assert (grad - expected[key]).norm() < 1e-5 * max(expected[key].norm(), 0.01 * largest), key


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_of_the_padding_is_read(name, poison):
    """Padding pixels of NaN, infinity and huge values, an image of nothing but padding: same features and gradients."""
    config = CONFIGS[name]
    encoder = awake(config)
    grids = [(4, 5), (2, 6), (1, 1), (0, 0), (5, 1)]
    mask = torch.zeros(5, 5, 6, dtype=torch.bool)
    clean = torch.randn(5, 3, 20 + 3 * config.crop_remainder, 24)
    for row, (h, w) in enumerate(grids):
        mask[row, :h, :w] = True
    pixels = torch.zeros(clean.shape, dtype=torch.bool)
    pixels[:, :, :20] = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    images = torch.where(pixels, clean, poison).requires_grad_()
    out = encoder(images, mask)
    real = [row for row in range(5) if row != 3]
    seen = [(out.tokens[row, : grids[row][0], : grids[row][1]], out.pooled[row]) for row in real]
    alone = [clean[row : row + 1, :, : 4 * grids[row][0], : 4 * grids[row][1]].requires_grad_() for row in real]
    expected = [encoder(image) for image in alone]
    for (tokens, pooled), other in zip(seen, expected, strict=True):
        assert relative(tokens, other.tokens[0]) < 1e-5
        assert relative(pooled, other.pooled[0]) < 1e-5
    weights = list(encoder.parameters())
    *grads, own = torch.autograd.grad(loss(seen), [*weights, images])
    truth = torch.autograd.grad(loss([(o.tokens[0], o.pooled[0]) for o in expected]), weights)
    largest = max(grad.norm() for grad in truth)
    for grad, other in zip(grads, truth, strict=True):
        assert (grad - other).norm() < 1e-5 * max(other.norm(), 0.01 * largest)
    assert own[~pixels.expand_as(own)].abs().max() == 0


def test_positions_follow_each_image_wherever_its_mask_lies():
    encoder = awake(BASE)
    image = torch.randn(1, 3, 8, 12)
    images, mask = torch.full((1, 3, 20, 20), float("nan")), torch.zeros(1, 5, 5, dtype=torch.bool)
    images[:, :, 8:16, 4:16] = image
    mask[:, 2:4, 1:4] = True
    assert relative(encoder(images, mask).tokens[:, 2:4, 1:4], encoder(image).tokens) < 1e-5
    with pytest.raises(ValueError, match=r"mask has shape \(1, 5, 4\); expected \(1, 5, 5\)"):
        encoder(images, mask[:, :, :4])
    with pytest.raises(ValueError, match=r"mask has dtype torch.float32; accepted: torch.bool"):
        encoder(images, mask.float())


@pytest.mark.parametrize("sizes", [[(8, 9)], [(16, 20), (3, 8)], [(0, 4)]])
def test_sizes_that_an_image_may_not_have_alone_it_may_not_have_among_others(sizes):
    encoder, images = Encoder(CGSPN), pictures(CGSPN, sizes)
    with pytest.raises(ValueError, match="images are") as alone:
        encoder(images[-1][None])
    with pytest.raises(ValueError, match="images are") as mixed:
        encoder.forward_variable_size(images)
    assert str(mixed.value) == f"images[{len(sizes) - 1}]: {alone.value}"


def test_wrong_input_is_named():
    encoder, images = Encoder(CGSPN), [torch.zeros(3, 8, 8), torch.zeros(3, 4, 4)]
    for options, message in [
        ({"method": "crop"}, "method is 'crop'; accepted: 'bucket', 'pad'"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_shapes": 0}, "max_shapes is 0"),
        ({"shapes": [(1, 9)]}, r"images\[0\] has 2 x 2 patches, which fit into none"),
    ]:
        with pytest.raises(ValueError, match=message):
            encode_variable_size(encoder, images, **options)
    with pytest.raises(ValueError, match="images is empty"):
        encode_variable_size(encoder, [])
    with pytest.raises(ValueError, match=r"images\[1\] is torch.float64 on cpu"):
        encode_variable_size(encoder, [images[0], images[1].double()])
    with pytest.raises(ValueError, match=r"images\[1\]: images has shape"):
        encode_variable_size(encoder, [images[0], torch.zeros(1, 4, 4)])


def photographs(count, spread):
    """Grids of about 27 x 27 tokens with aspect ratios around 1, of one area or of sides that vary by `spread`."""
    generator = torch.Generator().manual_seed(0)
    aspect = torch.randn(count, generator=generator) * 0.35
    side = 27 * torch.exp(torch.randn(count, generator=generator) * spread)
    sides = zip((side * torch.exp(aspect / 2)).tolist(), (side * torch.exp(-aspect / 2)).tolist(), strict=True)
    return [(max(1, round(h)), max(1, round(w))) for h, w in sides]


@pytest.mark.parametrize(("max_tokens", "max_shapes"), [(16384, 8), (4096, 3), (16384, 1), (10, 8)])
def test_buckets_stay_in_their_bounds_and_hold_every_image_once(max_tokens, max_shapes):
    grids = photographs(500, 0.3)
    packing = pack(grids, max_tokens=max_tokens, max_shapes=max_shapes)
    assert sorted(index for batch in packing.batches for index in batch.indices) == list(range(500))
    for batch in packing.batches:
        assert len(batch.indices) == 1 or len(batch.indices) * math.prod(batch.shape) <= max_tokens
        assert all(batch.shape[0] >= grids[i][0] and batch.shape[1] >= grids[i][1] for i in batch.indices)
    assert len({batch.shape for batch in packing.batches}) <= max_shapes
    assert len(packing.shapes) <= max_shapes * (1 + math.log2(max_tokens))


def test_buckets_waste_what_their_documentation_says():
    for spread, few, many in [(0.0, (8, 0.89), (16, 0.96)), (0.3, (16, 0.71), (64, 0.87))]:
        grids = photographs(2000, spread)
        for shapes, efficiency in (few, many):
            assert pack(grids, max_shapes=shapes).efficiency > efficiency
        assert pack(grids, max_shapes=1).efficiency < pack(grids, method="pad").efficiency < few[1]
    assert pack(grids[:200], max_shapes=200).efficiency == 1


def test_fixed_shapes_stay_the_same_for_other_images():
    grids = photographs(1000, 0.3)
    shapes = choose_shapes(grids, 16)
    met = set()
    for start in range(0, 1000, 100):
        met.update(pack(grids[start : start + 100], shapes=shapes).shapes)
    assert {shape[1:] for shape in met} <= set(shapes)
    assert len(met) <= 16 * (1 + math.log2(64))  # at most 64 of 100 images in a batch


def test_pad_keeps_neighbours_together_within_the_budget():
    packing = pack([(2, 2), (3, 1), (2, 3), (9, 9), (1, 1)], method="pad", max_tokens=30)
    assert [batch.indices for batch in packing.batches] == [(0, 1, 2), (3,), (4,)]
    assert packing.batches[0].shape == (3, 3)
    assert packing.efficiency == (4 + 3 + 6 + 81 + 1) / (27 + 81 + 1)


def test_a_batch_without_padding_has_no_mask():
    seen = []

    class Watching(Encoder):
        def forward(self, images, mask=None):
            seen.append(mask)
            return super().forward(images, mask)

    Watching(CGSPN).forward_variable_size(pictures(CGSPN, [(8, 8), (8, 8), (4, 4)]))
    assert seen == [None, None]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cgspn", "registers"])
def test_a_compiled_encoder_compiles_once_for_each_shape(name):
    encoder, images = awake(CONFIGS[name]), [image.detach() for image in pictures(CONFIGS[name])]
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    torch._dynamo.reset()
    fast = torch.compile(encoder, backend=backend, fullgraph=True, dynamic=False)
    shapes = pack([(image.shape[1] // 4, image.shape[2] // 4) for image in images], max_shapes=3).shapes
    for _ in range(2):
        with torch.no_grad():
            mixed = encode_variable_size(fast, images, max_shapes=3)
        for out, image in zip(mixed, images, strict=True):
            assert relative(out.tokens, encoder(image[None]).tokens[0]) < 1e-5
    assert len(compiled) == len(shapes)
