"""This library's own checkpoints: as strict and as forgiving as foreign ones."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import cgspn
from cgspn.models import CheckpointError


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    cgspn.create_model("cgspn_mini_patch4_28").save_pretrained(tmp_path / "own")
    return tmp_path / "own"


def rewrite(folder, **change):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def test_options_are_heeded_or_refused(folder):
    for source in (folder, "embedded"):
        with pytest.raises(CheckpointError, match="no option 'actvation'; did you mean 'activation'"):
            cgspn.load_encoder(source, actvation="gelu")
        with pytest.raises(CheckpointError, match="submodel is 'student'"):
            cgspn.load_encoder(source, submodel="student")
        with pytest.raises(CheckpointError, match="heads is 0"):
            cgspn.load_encoder(source, heads=0)
    with pytest.raises(CheckpointError, match="heads"):
        cgspn.load_encoder("embedded", heads=5)  # they do not divide its width
    assert cgspn.load_encoder(folder, dtype=torch.bfloat16).norm.weight.dtype == torch.bfloat16
    assert cgspn.load_encoder(folder, image_mean=(0.1,) * 3).config.image_mean == (0.1,) * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 28}, "image_size is 28"),
        ({"later_field": 1}, "has no later_field"),
        ({"width": 66}, "do not fit its config"),
        ({"image_crop_pct": 0}, "image_crop_pct is 0"),
        ({"image_resample": "sinc"}, "image_resample is 'sinc'"),
        ({"summary_tokens": [3]}, "summary_tokens is"),
    ],
)
def test_a_damaged_or_newer_config_is_one_kind_of_error(folder, change, message):
    encoder = json.loads((folder / "config.json").read_text())["encoder"]
    rewrite(folder, encoder={**encoder, **change})
    with pytest.raises(CheckpointError, match=message):
        cgspn.load_encoder(folder)


def test_a_config_without_its_parts(folder):
    rewrite(folder, encoder=None)
    with pytest.raises(CheckpointError, match="encoder is None; accepted: an object"):
        cgspn.load_encoder(folder)
    rewrite(folder, model="triple")
    with pytest.raises(CheckpointError, match="holds a 'triple' model"):
        cgspn.load_model(folder)


def test_a_bare_weight_file_is_recognised(folder, tmp_path):
    weights = folder / "model.safetensors"
    whole = cgspn.load_encoder(folder)
    assert torch.equal(cgspn.load_encoder(weights).norm.weight, whole.norm.weight)
    weights.rename(tmp_path / "student.safetensors")
    with pytest.raises(CheckpointError, match=r"this library's own, but no config\.json of it"):
        cgspn.load_encoder(tmp_path / "student.safetensors")


def test_shards_and_the_prefix_of_transformers_models_are_read(folder):
    state = load_file(folder / "model.safetensors")
    keys = sorted(state)
    (folder / "model.safetensors").unlink()
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for name, part in zip(names, (keys[::2], keys[1::2])):
        save_file({f"encoder.{key}": state[key] for key in part}, folder / name)
    weight_map = {f"encoder.{key}": names[i % 2] for i, key in enumerate(keys)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    loaded = cgspn.load_encoder(folder).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_null_in_what_timm_shares_is_a_value(folder):
    encoder = cgspn.create_model("gspn_mini_patch4_28")
    encoder.save_pretrained(folder)
    own = json.loads((folder / "config.json").read_text())["encoder"]
    shared = {"architecture": "gspn_mini_patch4_28", "num_classes": 0, "model_args": {"config": own}}
    (folder / "config.json").write_text(json.dumps(shared))
    assert cgspn.load_encoder(folder).config == encoder.config


def test_wrappings_of_training_are_taken_off(folder):
    state = load_file(folder / "model.safetensors")
    wrapped = {f"module._orig_mod.{k.replace('blocks.1.', 'blocks.1._orig_mod.')}": v for k, v in state.items()}
    save_file(wrapped, folder / "model.safetensors")
    assert torch.equal(cgspn.load_encoder(folder).norm.weight, state["norm.weight"])
    (folder / "model.safetensors").unlink()
    torch.save({"model": state, "model_ema": {k: v + 1 for k, v in state.items()}}, folder / "pytorch_model.bin")
    assert torch.equal(cgspn.load_encoder(folder).norm.weight, state["norm.weight"] + 1)
    assert torch.equal(cgspn.load_encoder(folder, submodel="model").norm.weight, state["norm.weight"])
    torch.save({"model": state}, folder.parent / "last.pth")
    with pytest.raises(CheckpointError, match="this library's own"):
        cgspn.load_encoder(folder.parent / "last.pth")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"dtype": torch.int8}, r"dtype is torch\.int8"),
        ({"heads": "4"}, "heads is '4'"),
        ({"heads": 5}, "heads is 5; a width of 96"),
        ({"image_mean": 0.5}, r"image_mean is 0\.5; accepted: a list"),
        ({"norm_eps": "a"}, "norm_eps is 'a'; accepted: a finite number"),
        ({"image_size": 28}, "image_size is 28; accepted: a list of 2"),
    ],
)
def test_options_of_another_type_are_refused(folder, options, message):
    with pytest.raises(CheckpointError, match=message):
        cgspn.load_encoder(folder, **options)
