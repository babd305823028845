"""Maps of exact strides lie where they should, at any image size."""

import math

import pytest
import torch

import cgspn
from cgspn.layers import AttentionConfig
from cgspn.models.pyramid import FeaturePyramid, at_stride


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    small = {"width": 32, "mlp_hidden": 64, "attention": AttentionConfig(2), "mixers": ("propagation",) * 2}
    return cgspn.create_model("cgspn_tiny_patch14_378", **small)


@pytest.mark.parametrize("size", [(1, 1), (14, 14), (29, 57), (64, 96)])
@pytest.mark.parametrize("strides", [(4, 8, 16, 32), (3.5, 7, 14, 28), (8, 64)])
def test_maps_cover_the_image(encoder, size, strides):
    pyramid = FeaturePyramid(encoder, 16, strides)
    maps = pyramid(torch.randn(2, 3, *size))
    assert [m.shape for m in maps.values()] == [(2, 16, *(math.ceil(side / s) for side in size)) for s in strides]
    assert all(torch.isfinite(m).all() for m in maps.values())


@pytest.mark.parametrize(("own", "stride"), [(3.5, 4), (7, 8), (14, 16), (28, 32), (14, 14), (16, 12)])
def test_cells_lie_over_the_pixels_that_their_stride_says(own, stride):
    """A map that holds the position of its cells' centres still does after it has been read at another stride."""
    centres = (torch.arange(20) + 0.5) * own
    features = torch.stack([centres[:, None].expand(20, 20), centres.expand(20, 20)])[None]
    size = math.ceil(20 * own / stride), math.ceil(20 * own / stride)
    read = at_stride(features, own, stride, size)
    assert read.shape[2:] == size
    inner = slice(1, size[0] - 2)  # what lies beyond the outermost centres is repeated
    expected = (torch.arange(size[0]) + 0.5) * stride
    torch.testing.assert_close(read[0, 0, inner, 3], expected[inner])
    torch.testing.assert_close(read[0, 1, 3, inner], expected[inner])


def test_a_batch_of_padded_images_gives_what_each_gives_alone(encoder):
    pyramid = FeaturePyramid(encoder, 16, (14,)).eval()
    images = torch.randn(1, 3, 42, 70)
    padded = torch.cat([images, torch.full((1, 3, 42, 28), 5.0)], 3)
    mask = torch.arange(7).expand(1, 3, 7) < 5
    with torch.no_grad():
        alone, beside = pyramid(images)["p4"], pyramid(padded, mask)["p4"]
    torch.testing.assert_close(beside[..., :4], alone[..., :4])  # the 3 x 3 convolution sees the next column


def test_gradients_reach_encoder_and_levels_and_a_block_can_be_chosen(encoder):
    pyramid = FeaturePyramid(encoder, 16, index=0)
    encoder.zero_grad()
    sum(m.square().mean() for m in pyramid(torch.randn(1, 3, 28, 42)).values()).backward()
    assert encoder.patch_embed.projection.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in encoder.blocks[1].parameters())
    assert all(p.grad is not None for p in pyramid.levels.parameters())


@pytest.mark.parametrize("strides", [(), (8, 4), (0, 4), (4, 4.5)])
def test_strides_that_make_no_pyramid_are_refused(encoder, strides):
    with pytest.raises(ValueError, match="strides is"):
        FeaturePyramid(encoder, 16, strides)
    with pytest.raises(ValueError, match="indices is"):
        FeaturePyramid(encoder, 16, index=5)
