"""One test runs every registered model through what users do with it.

Widths are the real ones. The mini and tiny models run whole; of the others, whose blocks are all alike, the last two
(in a hybrid one is attention), since a 27-block model would take minutes here and run the same code 25 times more.
Whole, all of them run on the meta device, where shapes are computed and values are not.
"""

import functools
from dataclasses import replace

import pytest
import torch

import cgspn
from cgspn.models import Encoder, model_config

NAMES = cgspn.list_models()
WHOLE = ("mini", "tiny")


def build(name, whole=True):
    config = model_config(name)
    if not whole or not any(size in name for size in WHOLE):
        config = replace(config, mixers=config.mixers[-2:])
    torch.manual_seed(0)
    return Encoder(config)


@functools.cache
def whole(name):
    with torch.device("meta"):
        return cgspn.create_model(name)


def heavy(names):
    """Wide models take seconds each; one of each kind and the small ones stay in the quick run."""
    quick = ("mini", "tiny", "small")
    return [pytest.param(name, marks=() if any(size in name for size in quick) else pytest.mark.slow) for name in names]


def gradients(encoder, images):
    encoder.zero_grad()
    out = encoder(images)
    (out.pooled.square().sum() + out.tokens.square().mean()).backward()
    return out, {key: parameter.grad for key, parameter in encoder.named_parameters()}


@pytest.mark.parametrize("name", heavy(NAMES))
def test_every_model_runs_learns_saves_loads_and_compiles(name, tmp_path):
    encoder = build(name)
    p, width = encoder.config.patch_size, encoder.config.width
    images = torch.randn(2, 3, 3 * p, 5 * p)  # neither square nor even
    out, plain = gradients(encoder, images)
    assert out.tokens.shape == (2, 3, 5, width)
    assert out.pooled.shape == (2, width)
    for key, gradient in plain.items():
        assert gradient is not None, key
        assert torch.isfinite(gradient).all(), key
    plain = {key: gradient.clone() for key, gradient in plain.items()}

    encoder.set_grad_checkpointing()
    for key, gradient in gradients(encoder, images)[1].items():
        torch.testing.assert_close(gradient, plain[key], msg=key)
    encoder.set_grad_checkpointing(False)

    encoder.eval()
    with torch.no_grad():
        assert torch.isfinite(encoder(torch.randn(1, 3, p, 7 * p)).tokens).all()  # a single line
        torch.compiler.reset()  # models before this one count as recompilations of the same forward
        shallow = build(name, whole=False).eval()  # compilers unroll the blocks, so that time grows with the depth
        compiled, eager = torch.compile(shallow, backend="aot_eager", fullgraph=True)(images), shallow(images)
        torch.testing.assert_close(compiled.tokens, eager.tokens)
        torch.testing.assert_close(compiled.pooled, eager.pooled)
    with pytest.raises(ValueError, match=f"multiples of the patch size {p}"):
        encoder(torch.randn(1, 3, 3 * p + 1, 5 * p))

    encoder.save_pretrained(tmp_path)
    loaded = cgspn.load_encoder(tmp_path)
    assert loaded.config == encoder.config
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, encoder.state_dict()[key]), key


@pytest.mark.parametrize("name", [name for name in NAMES if not any(size in name for size in WHOLE)])
def test_the_large_ones_run_whole_on_meta(name):
    encoder = whole(name)
    out = encoder(torch.empty(1, 3, 42, 70, device="meta"))
    assert out.tokens.shape == (1, 3, 5, encoder.config.width)
    assert len(encoder.each_block()) == encoder.config.depth == len(encoder.feature_info)


def test_sizes_grow_and_students_are_smaller_than_their_teachers():
    def millions(name):
        return sum(p.numel() for p in whole(name).parameters()) / 1e6

    for kind in ("vit", "cgspn", "hybrid"):
        sizes = [millions(f"{kind}_{size}_patch14_378") for size in ("tiny", "small", "base", "large", "so400m")]
        assert sizes == sorted(sizes)
    for size in ("tiny", "small", "base", "large", "so400m"):
        assert millions(f"cgspn_{size}_patch14_378") < millions(f"hybrid_{size}_patch14_378")
        assert millions(f"hybrid_{size}_patch14_378") < millions(f"vit_{size}_patch14_378")


def test_names_by_pattern() -> None:
    assert cgspn.list_models("cgspn_*") == [name for name in NAMES if name.startswith("cgspn_")]
    assert cgspn.list_models("no such*") == []
