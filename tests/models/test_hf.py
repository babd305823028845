"""The encoders through transformers' Auto classes, against the encoder itself."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import cgspn
from cgspn.data.prepare import Prepare, open_picture

pytest.importorskip("transformers.backbone_utils")

from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from cgspn.models.hf import CgspnBackbone, CgspnConfig, CgspnForImageClassification, CgspnImageProcessor, CgspnModel


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return cgspn.create_model("hybrid_mini_patch4_28").eval()


@pytest.fixture
def folder(encoder, tmp_path):
    encoder.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.randn(2, 3, 12, 20)


def pictures():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)) for size in ((40, 60), (70, 30))]


def test_one_folder_for_both_libraries(encoder, folder, images, tmp_path):
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, CgspnModel)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    out, own = model(images), encoder(images)
    torch.testing.assert_close(out.last_hidden_state, own.tokens.flatten(1, 2))
    torch.testing.assert_close(out.pooler_output, own.pooled)
    assert out.attentions is None
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(cgspn.load_encoder(tmp_path / "again")(images).pooled, own.pooled)
    assert cgspn.load_encoder(tmp_path / "again").config == encoder.config
    torch.testing.assert_close(AutoModel.from_pretrained(tmp_path / "again")(images).pooler_output, own.pooled)
    half = AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half(images).pooler_output.dtype == torch.bfloat16  # of float32 images, as its processor gives them


def test_hidden_states_are_the_tokens_before_and_after_each_block(encoder, folder, images):
    out = AutoModel.from_pretrained(folder)(images, output_hidden_states=True)
    maps = encoder.forward_intermediates(images, output_fmt="NLC")
    torch.testing.assert_close(out.hidden_states[0], encoder.embed(images)[0])
    for state, tokens in zip(out.hidden_states[1:], maps, strict=True):
        torch.testing.assert_close(state, tokens)
    assert AutoModel.from_pretrained(folder)(images, return_dict=False)[1].shape == out.pooler_output.shape


def test_classification_starts_a_head_learns_and_comes_back(encoder, folder, images, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(folder, num_labels=3)
    assert isinstance(model, CgspnForImageClassification)
    assert 0.01 < model.encoder.head.weight.std() < 0.03
    torch.testing.assert_close(model.encoder.blocks[0].mixer.up.weight, encoder.blocks[0].mixer.up.weight)
    labels = torch.tensor([0, 2])
    plain = model(images, labels=labels)
    torch.testing.assert_close(plain.loss, torch.nn.functional.cross_entropy(plain.logits, labels))
    plain.loss.backward()
    gradient = model.encoder.patch_embed.projection.weight.grad.clone()
    model.zero_grad()
    calls = []
    model.gradient_checkpointing_enable()
    recompute = model._gradient_checkpointing_func
    model._gradient_checkpointing_func = lambda *a: calls.append(1) or recompute(*a)
    model(images, labels=labels).loss.backward()
    assert len(calls) == encoder.config.depth
    torch.testing.assert_close(model.encoder.patch_embed.projection.weight.grad, gradient)
    model.save_pretrained(tmp_path)
    own = cgspn.load_encoder(tmp_path)
    torch.testing.assert_close(own.forward_head(own.forward_features(images)), plain.logits)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert again.config.num_labels == 3
    torch.testing.assert_close(again(images).logits, plain.logits)


def test_fresh_models_start_as_the_encoder_does():
    torch.manual_seed(3)
    model = AutoModel.from_config(CgspnConfig("cgspn_mini_patch4_28"))
    torch.manual_seed(3)
    own = cgspn.create_model("cgspn_mini_patch4_28")
    for key, value in own.state_dict().items():
        assert torch.equal(value, model.encoder.state_dict()[key]), key


def test_backbone_gives_normalised_maps_of_images_of_any_size(encoder, folder, images):
    backbone = CgspnBackbone.from_pretrained(folder, out_indices=[1, 4])
    first, last = backbone(images).feature_maps
    torch.testing.assert_close(last.permute(0, 2, 3, 1), encoder(images).tokens)
    torch.testing.assert_close(first, encoder.forward_intermediates(images, [0], norm=True)[0])
    assert (backbone.channels, backbone.out_features) == ([96, 96], ["stage1", "stage4"])
    assert backbone(torch.randn(1, 3, 13, 18)).feature_maps[0].shape == (1, 96, 4, 5)
    raw = CgspnBackbone.from_pretrained(folder, out_features=["stem"], apply_layernorm=False)
    torch.testing.assert_close(raw(images).feature_maps[0].flatten(2).mT, encoder.embed(images)[0])
    config = AutoConfig.from_pretrained(folder, out_features=["stage2"])
    assert isinstance(AutoBackbone.from_config(config), CgspnBackbone)


def test_config_reads_like_a_vit():
    config = CgspnConfig("vit_mini_patch4_28", num_labels=5)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (96, 4, 3)
    assert (config.image_size, config.patch_size, config.num_channels, config.intermediate_size) == (
        [28, 28],
        4,
        3,
        384,
    )
    assert config.num_labels == 5
    with pytest.raises(ValueError, match="did you mean"):
        CgspnConfig("vit_min_patch4_28")


def test_config_can_be_set_like_a_vits():
    config = CgspnConfig("vit_mini_patch4_28", hidden_size=48, image_size=56, num_hidden_layers=2)
    assert (config.encoder_config.width, config.encoder_config.image_size) == (48, (56, 56))
    config.num_hidden_layers, config.num_attention_heads = 5, 4
    assert CgspnModel(config).encoder.config.depth == 5
    with pytest.raises(ValueError, match="num_hidden_layers is 9"):
        CgspnConfig("hybrid_mini_patch4_28", num_hidden_layers=9)


def test_weights_that_a_checkpoint_lacks_start_as_new_ones(folder, images):
    path = folder / "model.safetensors"
    state = {key: value for key, value in load_file(path).items() if not key.startswith("pool.")}
    save_file(state, path, metadata={"format": "pt"})
    torch.manual_seed(0)
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert all(key.startswith("encoder.pool.") for key in info["missing_keys"])
    assert torch.equal(model.encoder.pool.norm.weight, torch.ones(96))
    assert 0.8 < model.encoder.pool.q.weight.std() * 96**0.5 < 1.2
    assert torch.equal(model.encoder.norm.weight, state["norm.weight"])
    assert model(images).pooler_output.isfinite().all()


def test_keys_on_disk_are_the_models_and_shards_load_bit_for_bit(encoder, folder, images, tmp_path):
    model = AutoModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "one")
    assert load_file(tmp_path / "one" / "model.safetensors").keys() == model.state_dict().keys()
    assert "cgspn.load_encoder" in (tmp_path / "one" / "README.md").read_text()
    model.save_pretrained(tmp_path / "many", max_shard_size="200KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    for name in ("one", "many"):
        for opened in (cgspn.load_encoder(tmp_path / name), AutoModel.from_pretrained(tmp_path / name).encoder):
            assert torch.equal(opened(images).pooled, encoder(images).pooled)


def test_blocks_compiled_one_by_one_are_saved_under_their_own_names(encoder, folder, images, tmp_path):
    model = AutoModel.from_pretrained(folder)
    names = model.state_dict().keys()
    for number, block in enumerate(model.encoder.blocks):
        model.encoder.blocks[number] = torch.compile(block, backend="eager")
    for number, given in enumerate(({}, {"state_dict": model.state_dict()})):
        model.save_pretrained(tmp_path / str(number), **given)
        assert load_file(tmp_path / str(number) / "model.safetensors").keys() == names
        assert torch.equal(
            AutoModel.from_pretrained(tmp_path / str(number)).encoder(images).pooled, encoder(images).pooled
        )


def test_attention_blocks_give_their_maps(encoder, folder, images):
    model = AutoModel.from_pretrained(folder)
    out, plain = model(images, output_attentions=True, interpolate_pos_encoding=True), model(images)
    torch.testing.assert_close(out.last_hidden_state, plain.last_hidden_state)
    (attention,) = out.attentions  # one of the four blocks attends
    tokens, grid = encoder.embed(images)
    for block in encoder.each_block()[:3]:
        tokens = block(tokens, grid)
    block = encoder.each_block()[3]
    torch.testing.assert_close(attention, block.mixer.weights(block.norm1(tokens), grid))
    assert plain.attentions is None
    assert model.get_input_embeddings() is model.encoder.patch_embed


def test_processor_prepares_as_the_config_says(folder, tmp_path):
    processor = AutoImageProcessor.from_pretrained(folder)
    assert isinstance(processor, CgspnImageProcessor)
    values = processor(pictures())["pixel_values"]
    assert values.shape == (2, 3, 28, 28)
    # the whole width of a picture that is as wide as the size is kept, the middle of its height
    picture = np.arange(56 * 28 * 3, dtype=np.uint8).reshape(56, 28, 3)
    expected = (torch.tensor(picture[14:42]).permute(2, 0, 1) / 255 - 0.5) / 0.5
    torch.testing.assert_close(processor(picture)["pixel_values"][0], expected)
    forms = [picture, Image.fromarray(picture), torch.tensor(picture).permute(2, 0, 1), torch.tensor(picture) / 255]
    for form in forms:
        torch.testing.assert_close(processor([form])["pixel_values"][0], expected)
    squashed = processor(np.zeros((9, 50), np.uint8), aspect="squash", do_normalize=False, return_tensors="np")
    assert squashed["pixel_values"].shape == (1, 3, 28, 28)
    assert not squashed["pixel_values"].any()
    kept = AutoImageProcessor.from_pretrained(folder, aspect="keep")
    kept.save_pretrained(tmp_path)
    assert CgspnImageProcessor.from_pretrained(tmp_path).aspect == "keep"
    assert json.loads((folder / "preprocessor_config.json").read_text())["size"] == {"height": 28, "width": 28}


def test_pictures_in_their_own_shapes_get_what_they_get_alone(folder):
    processor, model = AutoImageProcessor.from_pretrained(folder, aspect="keep"), AutoModel.from_pretrained(folder)
    together = processor(pictures())
    assert together["pixel_values"].shape[2:] == together["pixel_mask"].shape[1:]
    assert together["pixel_mask"].sum((1, 2)).tolist() == [24 * 36, 44 * 20]  # of about 28 * 28, in patches of 4
    with torch.no_grad():
        out = model(**together).pooler_output
        for picture, row in zip(pictures(), out, strict=True):
            torch.testing.assert_close(model(**processor(picture)).pooler_output[0], row)


@pytest.mark.parametrize("height", [1, 3, 40])
def test_pictures_come_out_as_in_evaluation(height):
    processor = CgspnImageProcessor(size=28)
    prepare = Prepare((28, 28), mean=(0.5,) * 3, std=(0.5,) * 3)
    ramp = np.tile(np.linspace(0, 65535, 50).astype(np.uint16), (height, 1))
    for picture in (Image.new("RGB", (50, height), "red"), Image.new("RGBA", (50, height)), Image.fromarray(ramp)):
        expected = prepare(open_picture(picture))
        assert torch.equal(processor(picture)["pixel_values"][0], expected)
    assert processor(np.ones((height, 50), bool))["pixel_values"].unique().tolist() == [1.0]
    grey = CgspnImageProcessor(size=28, image_mean=[0.5], image_std=[0.5])
    assert grey(Image.new("L", (50, height)))["pixel_values"].shape == (1, 1, 28, 28)


def test_options_of_transformers_calls():
    processor, picture = CgspnImageProcessor(size=28), np.full((28, 28, 3), 51, np.uint8)
    for options, value in (({"do_normalize": False}, 0.2), ({"do_normalize": False, "do_rescale": False}, 51.0)):
        torch.testing.assert_close(processor(picture, **options)["pixel_values"].mean(), torch.tensor(value))
    torch.testing.assert_close(
        processor(picture / 255, do_rescale=False, do_normalize=False)["pixel_values"].max(), torch.tensor(0.2)
    )
    clip = processor(picture, size={"shortest_edge": 32}, do_center_crop=True, crop_size=24, resample=3)
    assert clip["pixel_values"].shape == (1, 3, 24, 24)
    planes = np.zeros((30, 40, 4), np.uint8)
    four = processor(
        planes, do_convert_rgb=False, image_mean=[0.0] * 4, image_std=[1.0] * 4, input_data_format="channels_last"
    )
    assert four["pixel_values"].shape == (1, 4, 28, 28)
    assert processor(picture, data_format="channels_last")["pixel_values"].shape == (1, 28, 28, 3)


def test_what_is_no_picture_is_refused():
    processor = CgspnImageProcessor()
    for arguments, message in (
        ({"images": np.full((4, 4, 3), 128.0)}, "runs from 128 to 128; accepted: 0 to 1"),
        ({"images": [np.zeros((4, 5, 3), np.uint8), np.zeros((5, 4, 3), np.uint8)], "do_resize": False}, "sizes"),
        ({"images": np.zeros((4, 4, 3), np.uint8), "aspect": "fit"}, "aspect is 'fit'"),
        ({"images": np.zeros((4, 4, 3), np.uint8), "size": {"shortest_edge": 4}}, "size is"),
        ({"images": Image.new("RGB", (0, 4)), "aspect": "keep"}, "a picture has 4 x 0 pixels"),
        ({"images": np.zeros((4, 4, 3), np.uint8), "image_std": [0.5, 0.5, 0.0]}, "image_std is .* numbers above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(**arguments)
    with pytest.raises(ValueError, match=r"images has dtype torch.uint8; accepted: floating point, normalised"):
        CgspnModel(CgspnConfig("cgspn_mini_patch4_28"))(torch.zeros(1, 3, 28, 28, dtype=torch.uint8))


@pytest.mark.slow
def test_transformers_own_onnx_exporter_takes_scans(folder, images):
    exporter = pytest.importorskip("transformers.exporters.exporter_onnx")
    pytest.importorskip("onnxruntime")
    model = AutoModel.from_pretrained(folder).eval()
    program = exporter.OnnxExporter().export(model, {"pixel_values": images}, config=exporter.OnnxConfig(dynamic=False))
    expected = model(images).last_hidden_state
    torch.testing.assert_close(program(pixel_values=images).last_hidden_state, expected, atol=1e-4, rtol=1e-4)
