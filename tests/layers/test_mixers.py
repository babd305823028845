"""Mixers behind one interface: what they mix, what they ignore, how they start."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from cgspn.layers import (
    GSPN,
    GSPN_WALK,
    AttentionConfig,
    AttentionMixer,
    Grid,
    MapPool,
    MeanPool,
    PropagationConfig,
    PropagationMixer,
)
from cgspn.layers.propagation import value_config
from cgspn.ops import propagate_2d_reference

CONFIGS = {
    "default": PropagationConfig(compression=4),
    "sum": PropagationConfig(compression=4, merge="sum"),
    "bare": PropagationConfig(4, merge="sum", latent_norm=False, merge_norm=False, local_kernel=0),
    "two directions": PropagationConfig(4, directions=("right", "up")),
    "shared": PropagationConfig(compression=4, channels_per_group=3),
    "forgetting": PropagationConfig(compression=4, forget_gate=True),
    "values": PropagationConfig(compression=4, value_expansion=3, channels_per_group=2, forget_gate=True),
    "normalised": PropagationConfig(4, value_expansion=3, channels_per_group=2, forget_gate=True, normalise_state=True),
    "normalised latent, summed": PropagationConfig(compression=4, merge="sum", normalise_state=True),
    "values, summed": PropagationConfig(compression=4, value_expansion=2, merge="sum", inner_residual=True),
    "values, two directions": PropagationConfig(
        4, directions=("up", "left"), value_expansion=1, channels_per_group=3, inner_residual=True
    ),
    **GSPN_WALK,
}


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def awake(mixer):
    """Weights far from the near-zero start, so that a test sees all of them."""
    with torch.no_grad():
        for p in mixer.parameters():
            p.normal_(std=p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3)
    return mixer


@pytest.mark.parametrize("name", CONFIGS)
def test_propagation_equals_its_definition(name):
    """The mixer, recomputed in float64 from its weights and the reference operator."""
    torch.manual_seed(0)
    config, grid = CONFIGS[name], Grid(3, 5)
    mixer = awake(PropagationMixer(24, config)).double()
    tokens = torch.randn(2, 15, 24, dtype=torch.float64)
    x = mixer.down(mixer.expand(mixer.project_in(tokens))).view(2, 3, 5, -1)
    if mixer.local is not None:
        x = x + mixer.local(x.movedim(-1, 1)).movedim(1, -1)
    x = mixer.norm(x)
    weight, bias = (t.unflatten(0, (len(config.directions), -1)) for t in mixer.param_proj.parameters())
    latent, values = x[..., : mixer.latent], x[..., mixer.latent :]
    scanned, entered = [], []
    for d, direction in enumerate(config.directions):  # each with its own rows of the projection, over its own values
        own = x if config.value_expansion is None else values.chunk(len(config.directions), -1)[d]
        p = (latent @ weight[d].T + bias[d]).unflatten(-1, (mixer.params_per_direction, -1)).unsqueeze(3)
        p = p.repeat_interleave(config.channels_per_group, -1)
        keep = p[..., 5, :] if config.forget_gate else None
        logits, lam, u = p[..., 2:5, :], p[..., 0, :], p[..., 1, :]
        if config.normalise_state:
            lam = torch.nn.functional.softplus(lam)
        h = propagate_2d_reference(own, logits, lam, u, keep=keep, directions=(direction,))
        if config.normalise_state:  # by the weights of the sum: the same scan of ones
            one = torch.ones_like(own)
            h = h / propagate_2d_reference(one, logits, lam, torch.ones_like(u), keep=keep, directions=(direction,))
        scanned.append(h)
        entered.append(own)
    y = torch.cat(scanned, -1) if config.merge == "concat" else sum(scanned)
    y = mixer.merge_norm(y)
    if config.inner_residual and config.merge == "concat":
        y = y + torch.cat(entered, -1)
    elif config.inner_residual:
        y = y + (entered[0] if config.value_expansion is None else sum(entered))
    expected = mixer.project_out(mixer.up(y)).flatten(1, 2)
    assert relative(mixer(tokens, grid), expected) < 1e-12


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"directions": ()}, "directions is ()"),
        ({"directions": ("down", "down")}, "each once"),
        ({"channels_per_group": 0}, "channels_per_group is 0"),
        ({"channels_per_group": 4, "compression": 4}, "channels_per_group is 4; a latent of 6"),
        ({"value_expansion": 2, "compression": None}, "value_expansion is 2; accepted"),
        ({"value_expansion": 0}, "value_expansion is 0; accepted"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, wrong):
    with pytest.raises(ValueError, match=wrong):
        PropagationMixer(24, PropagationConfig(**settings))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_of_a_propagation_mixer_learns(name):
    torch.manual_seed(0)
    mixer = awake(PropagationMixer(24, CONFIGS[name]))
    mixer(torch.randn(2, 15, 24), Grid(3, 5)).square().sum().backward()
    for key, p in mixer.named_parameters():
        assert p.grad is not None, key
        assert p.grad.norm() > 0, key


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_normalised_state_trains_in_bfloat16(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    torch.manual_seed(0)
    mixer = PropagationMixer(32, replace(value_config(3), compression=4, local_kernel=0)).to(device)
    tokens, wanted = torch.randn(2, 2, 12, 32, device=device)
    optimizer = torch.optim.AdamW(mixer.parameters(), lr=2e-2)
    losses = []
    for _ in range(12):
        with torch.autocast(device, torch.bfloat16):
            loss = (mixer(tokens, Grid(3, 4)).float() - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses


@pytest.mark.parametrize("name", ["default", "sum", "bare", "GSPN"])
def test_padding_changes_nothing(name):
    """Features of a padded grid equal those of the grid alone; gradients do not reach the padding."""
    torch.manual_seed(0)
    mixer = awake(PropagationMixer(24, CONFIGS[name])).double()
    small = torch.randn(2, 3, 4, 24, dtype=torch.float64)
    padded = torch.randn(2, 5, 6, 24, dtype=torch.float64)
    padded[:, :3, :4] = small
    padded.requires_grad_()
    mask = torch.zeros(2, 5, 6, dtype=torch.bool)
    mask[:, :3, :4] = True
    out = mixer(padded.flatten(1, 2), Grid(5, 6, mask=mask)).view(2, 5, 6, 24)[:, :3, :4]
    assert relative(out, mixer(small.flatten(1, 2), Grid(3, 4)).view(2, 3, 4, 24)) < 1e-12
    (grad,) = torch.autograd.grad(out.sum(), padded)
    assert grad[~mask].abs().max() == 0


def test_attention_equals_softmax_and_its_own_map():
    torch.manual_seed(0)
    mixer, grid = AttentionMixer(24, AttentionConfig(heads=3)).double(), Grid(2, 3, prefix=1)
    tokens = torch.randn(2, 7, 24, dtype=torch.float64)
    q, k, v = mixer.qkv(tokens).chunk(3, -1)
    heads = []
    for h in range(3):
        part = slice(8 * h, 8 * h + 8)
        weights = (q[..., part] @ k[..., part].mT / 8**0.5).softmax(-1)
        assert relative(mixer.weights(tokens, grid)[:, h], weights) < 1e-12
        heads.append(weights @ v[..., part])
    assert relative(mixer(tokens, grid), mixer.out(torch.cat(heads, -1))) < 1e-12


def test_attention_and_pooling_ignore_padding():
    torch.manual_seed(0)
    small, padded = torch.randn(2, 3, 4, 24), torch.randn(2, 5, 6, 24)
    padded[:, :3, :4] = small
    mask = torch.zeros(2, 5, 6, dtype=torch.bool)
    mask[:, :3, :4] = True
    mixer = AttentionMixer(24, AttentionConfig(heads=3))
    out = mixer(padded.flatten(1, 2), Grid(5, 6, mask=mask)).view(2, 5, 6, 24)[:, :3, :4]
    assert relative(out, mixer(small.flatten(1, 2), Grid(3, 4)).view(2, 3, 4, 24)) < 1e-5
    for pool in (MeanPool(), MapPool(24, 3, 48, "gelu", 1e-6)):
        alone = pool(small.flatten(1, 2), Grid(3, 4))
        assert relative(pool(padded.flatten(1, 2), Grid(5, 6, mask=mask)), alone) < 1e-5


def test_pooling_leaves_the_prefix_out():
    tokens = torch.randn(2, 7, 24)
    assert relative(MeanPool()(tokens, Grid(2, 3, prefix=1)), tokens[:, 1:].mean(1)) < 1e-6
    pool = MapPool(24, 3, 48, "gelu", 1e-6)
    assert relative(pool(tokens, Grid(2, 3, prefix=1)), pool(tokens[:, 1:], Grid(2, 3))) < 1e-6


def test_gspn_has_the_whole_shell_and_the_walk_ends_at_the_default():
    mixer = PropagationMixer(24, GSPN)
    assert mixer.latent == 48
    assert isinstance(mixer.down, nn.Identity)
    assert isinstance(mixer.project_in, nn.Linear)
    assert list(GSPN_WALK.values())[-1] == PropagationConfig()


@pytest.mark.parametrize(("compression", "latent"), [(1, 1152), (6, 192), (18, 64), (72, 16), (12, 96)])
def test_latent_width_is_the_floor_of_width_over_compression(compression, latent):
    assert PropagationConfig(compression).latent_width(1152) == latent


@pytest.mark.parametrize(("values", "share", "own"), [(6, 8, 96), (3, 8, 48), (1, 8, 16), (0.1, 8, 8), (2.5, 1, 40)])
def test_values_are_dealt_out_in_whole_sets(values, share, own):
    mixer = PropagationMixer(1152, PropagationConfig(18, value_expansion=values, channels_per_group=share))
    assert mixer.value_width == own
    assert mixer.down.out_features == 64 + 4 * own
    assert mixer.up.in_features == 4 * own


@pytest.mark.parametrize("compression", [0, -1, 25, float("nan")])
def test_a_compression_that_leaves_no_channel_is_refused(compression):
    with pytest.raises(ValueError, match=r"compression is .* a width of 24 accepts"):
        PropagationMixer(24, PropagationConfig(compression))


def test_propagation_refuses_prefix_tokens_and_wrong_counts():
    mixer = PropagationMixer(24, CONFIGS["default"])
    with pytest.raises(ValueError, match="16 tokens with 1 before the grid"):
        mixer(torch.randn(1, 16, 24), Grid(3, 5, prefix=1))
    with pytest.raises(ValueError, match="exactly 3 x 5"):
        mixer(torch.randn(1, 16, 24), Grid(3, 5))
    with pytest.raises(ValueError, match="heads is 5"):
        AttentionMixer(24, AttentionConfig(heads=5))
