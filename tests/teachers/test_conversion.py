"""What a conversion inherits, counts and writes, as the command's user meets it."""

import json
from dataclasses import replace

import pytest
import torch

import cgspn
from cgspn.commands.convert import RECORD, Convert
from cgspn.layers import PropagationConfig, value_config
from cgspn.teachers.convert import student_mixers
from cgspn.teachers.parameters import parameter_table


def small(**fields):
    torch.manual_seed(0)
    return cgspn.create_model("vit_mini_patch4_28", **fields).eval()


def with_class_token():
    fields = {"class_token": True, "registers": 2, "pooling": "cls", "patch_bias": False, "layer_scale": 0.5}
    return small(**fields)


def test_every_parameter_is_counted_once():
    teacher = with_class_token()
    reports = []
    student = cgspn.convert(teacher, compression=4, keep_attention=1, report=reports.append)
    (origin,) = reports
    *rows, total = parameter_table(teacher, student, origin.inherited)
    assert total.teacher == sum(p.numel() for p in teacher.parameters())
    assert total.student == sum(p.numel() for p in student.parameters()) == total.inherited + total.fresh
    assert set(origin.inherited) | set(origin.fresh) == set(student.state_dict())
    part = {row.part: row for row in rows}
    assert part["class and registers"].student == 0
    assert part["class and registers"].teacher == 3 * teacher.config.width
    assert part["pooling"].fresh == part["pooling"].student > 0  # a class token's place is taken by a fresh MAP head
    assert part["attention"].inherited == part["attention"].student == part["attention"].teacher // 4
    assert part["patch embedding"].student == part["patch embedding"].teacher + teacher.config.width
    assert part["propagation"].inherited == 0
    mean = teacher.positions.table.mean(0)
    torch.testing.assert_close(student.patch_embed.projection.bias, mean)


def test_nothing_is_left_without_weights_and_sharing_changes_no_value():
    teacher = with_class_token()
    students = []
    for share in (False, True):
        torch.manual_seed(1)
        students.append(cgspn.convert(teacher, compression=4, keep_attention=[0, 2], share=share))
    apart, shared = (student.state_dict() for student in students)
    assert all(torch.equal(apart[name], shared[name]) for name in apart)
    theirs = teacher.state_dict()
    same = {name for name in shared if name in theirs and shared[name].data_ptr() == theirs[name].data_ptr()}
    assert "blocks.0.mixer.qkv.weight" in same
    assert not any(apart[name].data_ptr() == theirs[name].data_ptr() for name in same)
    assert students[0](torch.randn(1, 3, 28, 56)).pooled.isfinite().all()


def test_a_low_precision_teacher_gives_a_float32_student():
    student = cgspn.convert(small().bfloat16(), compression=4)
    assert {p.dtype for p in student.parameters()} == {torch.float32}


def test_the_command_writes_what_came_from_where(tmp_path, capsys):
    teacher = with_class_token()
    teacher.save_pretrained(tmp_path / "teacher")
    Convert(str(tmp_path / "teacher"), tmp_path / "out", compression=4, keep_layers=(1, 3)).run()
    assert "attention stays in layers 1, 3" in " ".join(capsys.readouterr().out.split())
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["attention layers"] == [1, 3]
    assert record["latent channels"] == teacher.config.width // 4
    assert record["parameters"][-1]["student"] == sum(
        p.numel() for p in cgspn.load_encoder(tmp_path / "out").parameters()
    )
    state = cgspn.load_encoder(tmp_path / "out").state_dict()
    kept = [name for name in record["inherited"] if name != "patch_embed.projection.bias"]
    assert all(torch.equal(state[name], teacher.state_dict()[name]) for name in kept)


def test_of_an_image_text_model_the_text_tower_comes_along(tmp_path):
    Convert("embedded", tmp_path / "whole", compression=4).run()
    Convert("embedded", tmp_path / "image", compression=4, image_only=True).run()
    texts = ["a photo of a bag", "a boot"]
    torch.testing.assert_close(
        cgspn.load_model(tmp_path / "whole").encode_text(texts),
        cgspn.teachers.load_embedded_teacher().encode_text(texts),
    )
    assert isinstance(cgspn.teachers.load_model(tmp_path / "image"), cgspn.Encoder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep_attention": 1, "keep_layers": (2,)}, "both given"),
        ({"keep_layers": (4,)}, r"keep_attention holds \[4\]; accepted: layer indices 0 to 3"),
        ({"compression": 97}, "compression is 97"),
        ({"value_expansion": 0.0}, "value_expansion is 0; accepted: a number above 0, or None"),
        ({"value_expansion": float("inf")}, "value_expansion is inf; accepted: a number above 0"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Convert("embedded", tmp_path, **arguments).run()
    assert not list(tmp_path.iterdir())


def test_a_student_is_replaced_only_if_that_is_asked_for(tmp_path):
    Convert("embedded", tmp_path, compression=4).run()
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"which holds config.json, .*; give another out, or --overwrite"):
        Convert("embedded", tmp_path, compression=3).run()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    Convert("embedded", tmp_path, compression=3, overwrite=True).run()
    assert json.loads((tmp_path / "conversion.json").read_text())["compression"] == 3


def test_values_from_python_are_those_of_the_command_line():
    student = cgspn.convert(small(), compression=4, value_expansion=6)
    assert student.config.propagation == replace(value_config(6), compression=4)
    with pytest.raises(ValueError, match="value_expansion is 6 and propagation"):
        cgspn.convert(small(), value_expansion=6, propagation=PropagationConfig())


@pytest.mark.parametrize(
    ("keep", "windows", "expected"),
    [
        (1, 3, "wwwa"),
        (0, 4, "wwww"),
        (2, 1, "pawa"),
        ([0], [2, 3], "apww"),
        (1, [3], "ppaw"),
        ([1, 2], 1, "paaw"),
        (0, 0, "pppp"),
    ],
)
def test_whole_attention_and_windows_name_layers_or_counts(keep, windows, expected):
    mixers = student_mixers(4, keep, windows)
    assert "".join(mixer[0] for mixer in mixers) == expected


def test_windows_inherit_the_weights_of_attention():
    teacher = with_class_token()
    student = cgspn.convert(teacher, compression=4, keep_attention=[3], window_attention=[1, 2], window=(3, 2))
    assert student.config.mixers == ("propagation", "window_attention", "window_attention", "attention")
    for i in (1, 2, 3):
        own, theirs = student.blocks[i].mixer.state_dict(), teacher.blocks[i].mixer.state_dict()
        assert all(torch.equal(own[name], theirs[name]) for name in theirs)
    assert student.blocks[1].mixer.window == (3, 2)
    assert student(torch.randn(1, 3, 20, 28)).pooled.isfinite().all()


def test_where_nothing_propagates_positions_stay_and_large_windows_give_the_teacher():
    teacher = small()
    student = cgspn.convert(teacher, window_attention=4, window=7)
    images = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(student(images).tokens, teacher(images).tokens, atol=1e-5, rtol=1e-4)
    assert student.config.name == "window_mini_patch4_28"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep_attention": [1], "window_attention": [1, 2]}, r"both hold \[1\]; accepted: each layer once"),
        ({"keep_attention": 3, "window_attention": 2}, "window_attention is 2; accepted: 0 to 1"),
        ({"window_attention": [4]}, r"window_attention holds \[4\]; accepted: layer indices 0 to 3"),
        ({"window_attention": [1.0]}, r"window_attention holds \[1.0\]; accepted: layer indices 0 to 3"),
        ({"window_attention": 1, "window": 0}, "window is 0; accepted: 1 to 65536 positions"),
    ],
)
def test_layers_that_do_not_go_together_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        cgspn.convert(small(), compression=4, **arguments)
