"""Parity with transformers on random weights, float32, at the native size and at others that are not square."""

import pytest
import torch
from parity import relative, shaken

import cgspn
from cgspn.models import DualEncoder
from cgspn.teachers import load_model

transformers = pytest.importorskip("transformers")
VISION = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 112,
    "patch_size": 14,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 12,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
NAFLEX = {k: v for k, v in VISION.items() if k != "image_size"} | {"num_patches": 64}
DINO = {k: v for k, v in VISION.items() if k != "intermediate_size"} | {"mlp_ratio": 2}
SIZES = [(112, 112), (70, 182), (56, 84)]  # native; one side smaller and one larger; both smaller


def build(name):
    t = transformers
    clip = {"text_config": TEXT, "vision_config": VISION, "projection_dim": 24}
    return {
        "clip": lambda: t.CLIPModel(t.CLIPConfig(**clip)),
        "clip gelu": lambda: t.CLIPVisionModelWithProjection(
            t.CLIPVisionConfig(**VISION, hidden_act="gelu", projection_dim=24)
        ),
        "clip tower": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**VISION)),
        "siglip": lambda: t.SiglipModel(t.SiglipConfig(text_config=TEXT, vision_config=VISION)),
        "siglip tower": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**VISION)),
        "siglip 384": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**{**VISION, "image_size": 118})),
        "siglip2": lambda: t.Siglip2Model(t.Siglip2Config(text_config=TEXT, vision_config=NAFLEX)),
        "siglip2 tower": lambda: t.Siglip2VisionModel(t.Siglip2VisionConfig(**NAFLEX)),
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**DINO)),
        "dinov2 swiglu": lambda: t.Dinov2Model(t.Dinov2Config(**DINO, use_swiglu_ffn=True)),
        "dinov2 no bias": lambda: t.Dinov2Model(t.Dinov2Config(**DINO, qkv_bias=False)),
        "dinov2 registers": lambda: t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**DINO)),
        "dinov2 registers swiglu": lambda: t.Dinov2WithRegistersModel(
            t.Dinov2WithRegistersConfig(**DINO, use_swiglu_ffn=True)
        ),
        "dinov2 classifier": lambda: t.Dinov2ForImageClassification(t.Dinov2Config(**DINO, num_labels=7)),
    }[name]()


NAMES = [
    "clip",
    "clip gelu",
    "clip tower",
    "siglip",
    "siglip tower",
    "siglip 384",
    "siglip2",
    "siglip2 tower",
    "dinov2",
    "dinov2 swiglu",
    "dinov2 no bias",
    "dinov2 registers",
    "dinov2 registers swiglu",
    "dinov2 classifier",
]


def original(name, model, images):
    """Grid tokens [B, N, C] after the last norm and the pooled output, by transformers' own code."""
    tower = getattr(model, "vision_model", getattr(model, "dinov2", model))
    if name.startswith("siglip2"):
        p, (b, c, h, w) = 14, images.shape
        patches = images.view(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, p * p * c)
        shapes = torch.tensor([[h // p, w // p]] * b)
        out = tower(patches, torch.ones(patches.shape[:2], dtype=torch.long), shapes)
        return out.last_hidden_state, out.pooler_output
    if name.startswith("dinov2"):
        out = tower(images)
        cut = 1 + tower.config.num_register_tokens if "registers" in name else 1
        return out.last_hidden_state[:, cut:], out.last_hidden_state[:, 0]
    out = tower(images, interpolate_pos_encoding=True)
    if name.startswith("siglip"):
        return out.last_hidden_state, out.pooler_output
    pooled = out.pooler_output
    if hasattr(model, "visual_projection"):
        pooled = model.visual_projection(pooled)
    return tower.post_layernorm(out.last_hidden_state[:, 1:]), pooled


@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_pooled_output_equal_the_original(name, tmp_path):
    model = shaken(build(name))
    model.save_pretrained(tmp_path)
    encoder = cgspn.load_encoder(tmp_path)
    for size in [(118, 118)] if name == "siglip 384" else SIZES:
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            tokens, pooled = original(name, model, images)
            ours = encoder(images)
        assert relative(ours.tokens.flatten(1, 2), tokens) < 1e-5, size
        assert relative(ours.pooled, pooled) < 1e-5, size
    student = cgspn.convert(encoder, compression=4, keep_attention=1)
    out = student(torch.randn(1, 3, 70, 182))
    assert out.tokens.isfinite().all()
    assert out.pooled.shape == (1, encoder.config.pooled_width)
    assert out.pooled.isfinite().all()
    assert student.config.mixers.count("attention") == 1


def test_raw_features_of_clip_are_the_last_hidden_state(tmp_path):
    """transformers leaves CLIP's last norm to its class token; ours without the norm are its grid."""
    model = shaken(build("clip tower"))
    model.save_pretrained(tmp_path)
    images = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        (raw,) = cgspn.load_encoder(tmp_path).forward_intermediates(images, indices=1)
        theirs = model(images).last_hidden_state[:, 1:]
    assert relative(raw.flatten(2).mT, theirs) < 1e-5


@pytest.mark.parametrize("name", ["dinov2", "dinov2 swiglu"])
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".safetensors"])
def test_a_bare_file_needs_only_the_heads(suffix, name, tmp_path):
    from safetensors.torch import save_file

    model = shaken(build(name))
    path = tmp_path / f"weights{suffix}"
    state = {key: value.half() for key, value in model.state_dict().items()}
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    encoder = cgspn.load_encoder(path, heads=3)
    assert encoder.norm.weight.dtype == torch.float32
    images = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        theirs = model.half().float()(images).last_hidden_state[:, 1:]
        assert relative(encoder(images).tokens.flatten(1, 2), theirs) < 1e-5
    assert cgspn.load_encoder(path, dtype=torch.bfloat16, heads=3).norm.weight.dtype == (torch.bfloat16)
    with pytest.raises(cgspn.models.CheckpointError, match="width is 48, and no config states the number of heads"):
        cgspn.load_encoder(path)


def tokenizer(name):
    """Made here, as no vocabulary can be fetched: of words, or of letters for SigLIP 2, whose class is fixed."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    if name == "siglip2":
        pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *"abcdefghijklmnopqrstuvwxyz"]
        return transformers.Siglip2Tokenizer(vocab={piece: i for i, piece in enumerate(pieces)})
    words = ["<unk>", "<pad>", "<s>", "</s>", "a", "photo", "of", "bag", "boot", "the", "red"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("name", ["clip", "siglip", "siglip2"])
def test_text_towers_come_along(name, tmp_path):
    # the pooled vectors of both towers share a space: SigLIP's are as wide as its towers
    TEXT48 = {**TEXT, "projection_size": 48} if name != "clip" else TEXT
    t = transformers
    model = shaken(
        build("clip")
        if name == "clip"
        else t.SiglipModel(t.SiglipConfig(text_config=TEXT48, vision_config=VISION))
        if name == "siglip"
        else t.Siglip2Model(t.Siglip2Config(text_config=TEXT48, vision_config=NAFLEX))
    )
    model.save_pretrained(tmp_path / "hf")
    words = tokenizer(name)
    words.save_pretrained(tmp_path / "hf")
    dual = load_model(tmp_path / "hf")
    assert isinstance(dual, DualEncoder)
    texts = ["a photo of a bag", "the red boot"]
    batch = words(texts, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
    inputs = {"input_ids": batch["input_ids"]} | ({"attention_mask": batch["attention_mask"]} if name == "clip" else {})
    with torch.no_grad():
        theirs = model.get_text_features(**inputs)
        theirs = getattr(theirs, "pooler_output", theirs)
        ours = dual.encode_text(texts)
    assert relative(ours, torch.nn.functional.normalize(theirs, dim=-1)) < 1e-5
    assert dual.logit_scale.item() == pytest.approx(model.logit_scale.item())
    images = torch.randn(2, 3, 70, 112)
    student = dual.with_image(cgspn.convert(dual.image, compression=4))
    student.save_pretrained(tmp_path / "student")
    again = load_model(tmp_path / "student")
    with torch.no_grad():
        torch.testing.assert_close(again.encode_image(images), student.encode_image(images))
        torch.testing.assert_close(again.encode_text(texts), ours)
        logits = dual.encode_image(images) @ ours.T * dual.logit_scale.exp() + dual.logit_bias
    assert logits.shape == (2, 2)
    with pytest.raises(ValueError, match="none of them empty"):
        dual.encode_text([])


def test_without_a_tokenizer_the_image_side_comes_alone(tmp_path):
    build("siglip").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no tokenizer files"):
        assert not isinstance(load_model(tmp_path), DualEncoder)


def test_a_padded_batch_of_naflex_equals_the_original(tmp_path):
    model = shaken(build("siglip2 tower"))
    model.save_pretrained(tmp_path)
    encoder = cgspn.load_encoder(tmp_path)
    p, grids = 14, [(5, 13), (9, 4), (3, 3)]
    images = [torch.randn(3, h * p, w * p) for h, w in grids]
    longest = max(h * w for h, w in grids)
    patches, mask = torch.zeros(3, longest, p * p * 3), torch.zeros(3, longest, dtype=torch.long)
    for i, (image, (h, w)) in enumerate(zip(images, grids, strict=True)):
        patches[i, : h * w] = image.view(3, h, p, w, p).permute(1, 3, 2, 4, 0).reshape(h * w, -1)
        mask[i, : h * w] = 1
    with torch.no_grad():
        theirs = model(patches, mask, torch.tensor(grids))
        ours = encoder.forward_variable_size(images, method="pad", max_shapes=1)
    for i, (h, w) in enumerate(grids):
        assert relative(ours[i].tokens.flatten(0, 1), theirs.last_hidden_state[i, : h * w]) < 1e-5
        assert relative(ours[i].pooled, theirs.pooler_output[i]) < 1e-5


def test_siglip_lower_cases_whatever_tokenizer_its_folder_names(tmp_path):
    transformers = pytest.importorskip("transformers")
    vocab = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "\u2581": 4} | {chr(c): c - 28 for c in range(33, 127)}
    text = TEXT | {"vocab_size": len(vocab), "projection_size": VISION["hidden_size"]}
    config = transformers.SiglipConfig(text_config=text, vision_config=VISION)
    transformers.SiglipModel(config).save_pretrained(tmp_path)
    transformers.GemmaTokenizer(vocab=vocab, merges=[], padding_side="right").save_pretrained(tmp_path)
    model = cgspn.load_model(tmp_path)
    assert torch.equal(model.tokenizer("A Cat"), model.tokenizer("a cat"))
    assert tuple(model.tokenizer(["a", "b c"]).shape) == (2, model.context_length)


def test_text_towers_that_are_not_known_leave_the_image_side(tmp_path):
    transformers = pytest.importorskip("transformers")
    text = {"vocab_size": 30, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ChineseCLIPConfig(text_config=text, vision_config=VISION, projection_dim=32)
    transformers.ChineseCLIPModel(config).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="comes without its text tower: only those of transformers' clip"):
        model = cgspn.load_model(tmp_path)
    assert isinstance(model, cgspn.Encoder)
