"""Files of training runs: which model of several, and pickles that hold more than tensors."""

import argparse

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_recognition import C, timm_state, trunk

import cgspn
from cgspn.models import CheckpointError


def two():
    """Two models that differ."""
    torch.manual_seed(0)
    return timm_state(scale=True), timm_state(scale=True)


def loaded(path, state, **options):
    """Whether the model of a state is the one that is loaded."""
    weight = cgspn.load_encoder(path, heads=2, **options).patch_embed.projection.weight
    return torch.equal(weight, state["patch_embed.proj.weight"])


def below(prefix, state):
    return {f"{prefix}.{key}": value for key, value in state.items()}


@pytest.mark.parametrize(
    "layout",
    [
        lambda raw, good: {"model": below("student.backbone", raw) | below("teacher.backbone", good)},  # DINOv2
        lambda raw, good: {"student": below("module", raw), "teacher": below("module", good), "epoch": 3},  # DINO
        lambda raw, good: {"state_dict": raw, "state_dict_ema": good},  # timm
        lambda raw, good: {"model": raw, "model_ema": good},  # DeiT
        lambda raw, good: {"encoder": below("module", raw), "target_encoder": below("module", good)},  # I-JEPA
        lambda raw, good: {"state_dict": below("model", raw) | below("ema_model.module", good)},  # flat
    ],
)
def test_what_the_authors_evaluate_is_taken(layout, tmp_path):
    raw, good = two()
    torch.save(layout(raw, good), tmp_path / "x.pt")
    assert loaded(tmp_path / "x.pt", good)


def test_of_two_models_without_a_usual_one_the_user_chooses(tmp_path):
    raw, good = two()
    path = tmp_path / "x.pt"
    torch.save({"online": raw, "momentum": {"net": good}}, path)
    with pytest.raises(CheckpointError, match=r"holds 2 models, 'online', 'momentum.net'; .*submodel="):
        cgspn.load_encoder(path, heads=2)
    assert loaded(path, raw, submodel="online")
    assert loaded(path, good, submodel="momentum.net")
    assert loaded(path, good, submodel="momentum")
    with pytest.raises(CheckpointError, match=r"no submodel 'student'; accepted: 'online', 'momentum\.net'"):
        cgspn.load_encoder(path, heads=2, submodel="student")
    torch.save(raw | below("extra", good), path)
    assert loaded(path, raw, submodel="")
    save_file(trunk(raw) | below("dino", good), tmp_path / "x.safetensors")  # two towers of one model
    with pytest.raises(CheckpointError, match=r"holds 2 models"):
        cgspn.load_encoder(tmp_path / "x.safetensors", heads=2)
    torch.save({"student": raw, "teacher": good}, path)
    assert loaded(path, raw, submodel="student")


def test_weights_of_whole_numbers_need_the_scale_that_is_lost(tmp_path):
    state, _ = two()
    torch.save({key: (100 * value).to(torch.int8) for key, value in state.items()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"x.pt: .* is of torch.int8; accepted: dtypes like torch.float32"):
        cgspn.load_encoder(tmp_path / "x.pt", heads=2)
    torch.save(state | {"norm.weight": torch.full((C,), 1e6)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"norm.weight in torch.float16 holds values that are not finite"):
        cgspn.load_encoder(tmp_path / "x.pt", heads=2, dtype=torch.float16)


def test_wrappers_of_any_name_and_old_files_are_read(tmp_path):
    state, _ = two()
    for content in ({"net": state, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}}, below("module", state)):
        torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
        assert loaded(tmp_path / "x.pt", state)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"args": argparse.Namespace(lr=1)}, "argparse.Namespace"),
        ({"best": np.float64(1)}, "numpy.*scalar"),
        ({"net": torch.nn.Linear(2, 2)}, "torch.nn.modules.linear.Linear"),
    ],
)
def test_a_pickle_of_more_than_tensors_says_what_it_holds_and_how_to_convert_it(extra, named, tmp_path):
    torch.save({"state_dict": {}, **extra}, tmp_path / "last.pth")
    with pytest.raises(CheckpointError, match=rf"also holds {named}.*save its state dict alone") as error:
        cgspn.load_encoder(tmp_path / "last.pth")
    assert "\n" not in str(error.value)
    assert "\x1b" not in str(error.value)


def test_a_torchscript_program_is_not_run(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="is a TorchScript program"):
        cgspn.load_encoder(tmp_path / "x.pt")


def test_videos_have_patches_of_another_shape(tmp_path):
    state, _ = two()
    save_file(state | {"patch_embed.proj.weight": torch.zeros(C, 3, 2, 14, 14)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"patch_embed.proj.weight has shape .*; expected \[width, channels"):
        cgspn.load_encoder(tmp_path / "x.safetensors", heads=2)


@pytest.mark.parametrize(
    "wrapper", ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_fsdp_wrapped_module._orig_mod"]
)
def test_wrapped_blocks_are_read(wrapper, tmp_path):
    state = timm_state()
    torch.save(
        {f"module.{wrapper}.{k.replace('blocks.1.', f'blocks.1.{wrapper}.')}": v for k, v in state.items()},
        tmp_path / "x.pt",
    )
    weight = cgspn.load_encoder(tmp_path / "x.pt", heads=2).blocks[1].mlp.fc1.weight
    assert torch.equal(weight, state["blocks.1.mlp.fc1.weight"])
    torch.save(state | {f"{wrapper}.pos_embed": state["pos_embed"]}, tmp_path / "y.pt")
    with pytest.raises(CheckpointError, match="holds pos_embed twice"):
        cgspn.load_encoder(tmp_path / "y.pt", heads=2)


def test_the_target_of_an_online_network_is_not_the_usual_choice(tmp_path):
    parts = {f"{part}.{k}": v for part in ("online_encoder", "target_encoder") for k, v in timm_state().items()}
    torch.save(parts, tmp_path / "byol.pt")
    with pytest.raises(CheckpointError, match="holds 2 models, 'online_encoder', 'target_encoder'"):
        cgspn.load_encoder(tmp_path / "byol.pt", heads=2)
