"""One suite over every registered model, at sizes that a CPU can run; and the encoder's contract."""

from dataclasses import replace

import pytest
import torch

import cgspn
from cgspn.layers import AttentionConfig, PropagationConfig, window_attention
from cgspn.models import Encoder, model_config
from cgspn.models import encoder as encoder_module


def small(name):
    """The model behind a name with its depth and width cut down: the same code paths, a fraction of the time."""
    config = model_config(name)
    propagation = replace(config.propagation, compression=config.propagation.compression and 4)
    return Encoder(
        replace(
            config,
            width=32,
            mixers=config.mixers[-2:],
            mlp_hidden=64,
            attention=AttentionConfig(heads=2),
            propagation=propagation,
            image_size=(4 * config.patch_size, 4 * config.patch_size),
        )
    )


@pytest.mark.parametrize("name", cgspn.list_models())
def test_every_model_runs_learns_saves_and_loads(name, tmp_path):
    torch.manual_seed(0)
    encoder = small(name)
    p = encoder.config.patch_size
    images = torch.randn(2, 3, 3 * p, 5 * p)
    out = encoder(images)
    assert out.tokens.shape == (2, 3, 5, 32)
    assert out.pooled.shape == (2, 32)
    (out.pooled.square().sum() + out.tokens.square().sum()).backward()
    for key, parameter in encoder.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
    encoder.eval()
    grad = encoder.patch_embed.projection.weight.grad.clone()
    encoder.zero_grad()
    encoder.set_grad_checkpointing()
    again = encoder(images)
    (again.pooled.square().sum() + again.tokens.square().sum()).backward()
    torch.testing.assert_close(encoder.patch_embed.projection.weight.grad, grad)
    encoder.save_pretrained(tmp_path)
    loaded = cgspn.load_encoder(tmp_path)
    assert loaded.config == encoder.config
    assert torch.equal(loaded(images).tokens, out.tokens)
    one_line = encoder(torch.randn(1, 3, p, 6 * p))
    assert torch.isfinite(one_line.tokens).all()


def test_full_size_parameter_counts():
    """27 blocks of the SO400M teacher, counted by hand; the student keeps their MLPs and is smaller."""
    with torch.device("meta"):
        teacher = cgspn.create_model("vit_so400m_patch14_378")
        student = cgspn.create_model("cgspn_so400m_patch14_378")
    c, hidden, latent = 1152, 4304, 64
    mlp = 2 * c * hidden + hidden + c
    attention = 4 * c * c + 4 * c
    # P_down, 3x3 convolution, RMSNorm, parameters, RMSNorm, P_up
    propagation = (
        (c + 1) * latent + 10 * latent + latent + (latent + 1) * 20 * latent + 4 * latent + (4 * latent + 1) * c
    )
    for encoder, mixer in ((teacher, attention), (student, propagation)):
        assert sum(p.numel() for p in encoder.blocks.parameters()) == 27 * (mlp + mixer + 4 * c)


@pytest.mark.parametrize("compression", [6, 18, 72])
@pytest.mark.parametrize("grid", [16, 74, 147])
def test_a_fresh_student_has_bounded_features(compression, grid):
    """Finite and bounded however long the lines: the residual stream may not grow by more than the teacher's does."""
    torch.manual_seed(0)
    teacher = cgspn.create_model(
        "vit_small_patch14_378", width=144, mixers=("attention",) * 3, mlp_hidden=288, attention=AttentionConfig(3)
    )
    student = cgspn.convert(teacher, compression=compression)
    with torch.no_grad():
        maps = student.forward_intermediates(torch.randn(1, 3, 14 * grid, 14 * grid))
        branch = student.blocks[0].sublayer(*student.embed(torch.randn(1, 3, 14 * grid, 14 * grid)))
    assert all(torch.isfinite(m).all() for m in maps)
    assert maps[-1].abs().max() < 100
    assert branch.square().mean().sqrt() < 0.1  # P_up starts near zero: the sub-layer adds almost nothing


@pytest.mark.parametrize("overrides", [{}, {"merge_norm": False, "latent_norm": False, "merge": "sum"}])
@pytest.mark.parametrize("grid", [16, 147])
def test_without_its_norms_the_scan_grows_with_the_grid_but_stays_finite(grid, overrides):
    torch.manual_seed(0)
    config = model_config(
        "cgspn_tiny_patch14_378",
        width=72,
        mixers=("propagation",) * 2,
        mlp_hidden=72,
        attention=AttentionConfig(2),
        propagation=PropagationConfig(4, **overrides),
    )
    with torch.no_grad():
        assert torch.isfinite(Encoder(config)(torch.randn(1, 3, 14 * grid, 14 * grid)).tokens).all()


def test_forward_intermediates_follow_the_forward():
    torch.manual_seed(0)
    encoder = small("cgspn_tiny_patch14_378").eval()
    images = torch.randn(2, 3, 42, 56)
    (last,) = encoder.forward_intermediates(images, indices=1, norm=True)
    torch.testing.assert_close(last.permute(0, 2, 3, 1), encoder(images).tokens)
    both = encoder.forward_intermediates(images)
    assert len(both) == 2
    (first,) = encoder.forward_intermediates(images, indices=[-2])
    assert torch.equal(both[0], first)
    for indices in (0, 3, [2], [], [-3]):
        with pytest.raises(ValueError, match="indices is"):
            encoder.forward_intermediates(images, indices=indices)


def test_windows_keep_their_order_between_layers_and_nobody_sees_it(monkeypatch):
    """Whole passes move tokens only where the order changes, and give what layers give that move them each time."""
    config = replace(
        model_config("window_mini_patch4_28"),
        mixers=("window_attention", "window_attention", "attention", "window_attention"),
        window=(3, 2),
    )
    encoder = Encoder(config).eval()
    images = torch.randn(2, 3, 20, 28)
    moved = []
    whole = window_attention.order
    for module in (window_attention, encoder_module):
        monkeypatch.setattr(module, "order", lambda t, g, w: (moved.append(g.window != w), whole(t, g, w))[1])
    with torch.no_grad():
        tokens, grid = encoder.embed(images)
        states = []
        for block in encoder.each_block():
            tokens = block(tokens, grid)
            states.append(tokens)
        assert sum(moved) == 6  # in and out of each of three layers
        moved.clear()
        out = encoder(images)
        assert sum(moved) == 4
        torch.testing.assert_close(out.tokens.flatten(1, 2), encoder.norm(tokens))
        final, maps = encoder.forward_intermediates(images, intermediates_only=False, output_fmt="NLC")
    torch.testing.assert_close(final, encoder.norm(tokens))
    for one, other in zip(maps, states, strict=True):
        torch.testing.assert_close(one, other)


def test_teacher_positions_follow_the_grid():
    encoder = small("vit_tiny_patch14_378")
    table = encoder.positions(4, 4)
    assert torch.equal(table, encoder.positions.table)
    resized = encoder.positions(8, 4).view(8, 4, -1)
    # resizing by two keeps the mean of each pair of rows close to the row it came from
    pairs = resized.view(4, 2, 4, -1).mean(1)
    assert ((pairs - table.view(4, 4, -1)).norm() / table.norm()) < 0.35


@pytest.mark.parametrize("size", [(29, 28), (3, 28), (28, 0)])
def test_wrong_image_sizes_name_the_nearest_right_one(size):
    with pytest.raises(ValueError, match=r"accepted: multiples of the patch size 4, the nearest being"):
        cgspn.create_model("cgspn_mini_patch4_28")(torch.randn(1, 3, *size))
    with pytest.raises(ValueError, match=r"images has shape .*expected \[B, 3, H, W\]"):
        cgspn.create_model("cgspn_mini_patch4_28")(torch.randn(1, 1, 28, 28))


def test_names():
    names = cgspn.list_models()
    for size in ("tiny", "small", "base", "large", "so400m"):
        for kind in ("vit", "cgspn", "gspn", "hybrid", "window"):
            assert f"{kind}_{size}_patch14_378" in names
    with pytest.raises(ValueError, match="did you mean cgspn_so400m_patch14_378"):
        cgspn.create_model("cgspn_so400_patch14_378")
    with pytest.raises(ValueError, match="create_model has no widht"):
        cgspn.create_model("cgspn_tiny_patch14_378", widht=3)


def test_hybrid_keeps_three_of_twenty_seven_spread_evenly():
    mixers = model_config("hybrid_so400m_patch14_378").mixers
    assert [i for i, m in enumerate(mixers) if m == "attention"] == [8, 17, 26]


@pytest.mark.parametrize("name", ["vit_mini_patch4_28", "window_mini_patch4_28", "hybrid_mini_patch4_28"])
@pytest.mark.parametrize("masked", [False, True])
def test_forward_mode_ad_agrees_with_a_difference(name, masked):
    torch.manual_seed(0)
    encoder = cgspn.create_model(name).double().eval().requires_grad_(False)
    images, along = torch.randn(2, 2, 3, 32, 28, dtype=torch.float64)
    mask = torch.ones(2, 8, 7, dtype=torch.bool)
    mask[1, 6:] = not masked

    def pooled(images):
        return encoder(images, mask if masked else None).pooled

    _, tangent = torch.func.jvp(pooled, (images,), (along,))
    step = 1e-5
    torch.testing.assert_close(
        tangent, (pooled(images + step * along) - pooled(images - step * along)) / (2 * step), rtol=1e-5, atol=1e-7
    )
