"""Exported files give what the encoder gives, at every size and batch within their bounds, or they are not kept."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch

from cgspn.export import ExportError, bounds_for, export_model, load_exported
from cgspn.export import formats as formats_module
from cgspn.layers import GSPN, AttentionConfig, PropagationConfig
from cgspn.models import DualEncoder, Encoder, EncoderConfig, TextConfig, TextTower

VIT = EncoderConfig(
    image_size=(16, 20),
    patch_size=4,
    width=8,
    mixers=("attention",),
    mlp_hidden=8,
    attention=AttentionConfig(heads=2),
    propagation=PropagationConfig(2),
)
HYBRID = replace(VIT, mixers=("propagation", "attention"), positions=False)
CONFIGS = {
    "hybrid": HYBRID,
    "windows": replace(HYBRID, mixers=("propagation", "window_attention"), window=(2, 3)),
    "values": replace(
        HYBRID,
        propagation=PropagationConfig(
            2, value_expansion=3, channels_per_group=2, forget_gate=True, normalise_state=True
        ),
    ),
    "gspn": replace(HYBRID, mixers=("propagation",), propagation=replace(GSPN, expansion=1), pooling="mean"),
    "dinov2": replace(
        VIT, class_token=True, registers=2, pooling="cls", layer_scale=0.5, position_resize="bicubic_antialias"
    ),
    "siglip": replace(VIT, crop_remainder=True, position_resize="bilinear_antialias", num_classes=3),
    "clip": replace(VIT, class_token=True, pooling="cls", pre_norm=True, patch_bias=False, embed_dim=4),
}


def awake(config):
    torch.manual_seed(0)
    encoder = Encoder(config)
    with torch.no_grad():
        for p in encoder.parameters():
            p.copy_(torch.randn_like(p) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3))
    return encoder


def check(path, encoder, names):
    """The file, opened as a user would, at sizes that the export's own check has not tried."""
    run = load_exported(path)
    description = json.loads(path.with_name(f"{path.name}.json").read_text())
    assert list(description["outputs"]) == names
    torch.manual_seed(2)
    for batch, height, width in [(1, 4, 4), (2, 4, 44), (1, 28, 4), (4, 8, 12), (1, 16, 20)]:
        images = torch.randn(batch, 3, height, width)
        out = run(images)
        with torch.no_grad():
            expected = encoder(images)
        for got, wanted in zip(out, expected, strict=False):
            assert got.shape == wanted.shape
            assert (got - wanted).norm() < 1e-4 * wanted.norm()
    for shape in [(1, 1, 8, 8), (3, 8, 8)]:
        with pytest.raises(ValueError, match=r"expected \[B, 3, H, W\]"):
            run(torch.zeros(shape))
    for shape in [(1, 3, 52, 8), (5, 3, 8, 8), (1, 3, 8, 10)]:
        with pytest.raises(ValueError, match="exported for batches of 1 to 4 and sides of 4 to 48 pixels"):
            run(torch.zeros(shape))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hybrid", "windows", "values", "dinov2"])
@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_a_file_gives_what_the_encoder_gives_at_any_size(name, format, tmp_path):
    encoder, path = awake(CONFIGS[name]), tmp_path / f"{name}.{'onnx' if format == 'onnx' else 'pt2'}"
    found = export_model(encoder, path, format=format, max_size=48, max_batch=4)
    assert encoder.training
    assert next(encoder.parameters()).requires_grad
    assert max(error for parity in found for error in parity.errors.values()) < 1e-5
    assert {(p.height, p.width) for p in found} >= {(4, 4), (4, 48), (48, 4), (48, 48), (16, 20)}
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, f"{path.name}.json"]
    check(path, encoder, ["tokens", "pooled"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gspn", "siglip", "clip"])
@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_the_other_families_too(name, format, tmp_path):
    encoder, path = awake(CONFIGS[name]), tmp_path / f"{name}.{'onnx' if format == 'onnx' else 'pt2'}"
    export_model(encoder, path, format=format, max_size=48, max_batch=4)
    check(path, encoder, ["tokens", "pooled", *(["logits"] if name == "siglip" else [])])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler, and g++ is not here")
def test_a_compiled_package_gives_what_the_encoder_gives(tmp_path):
    encoder, path = awake(replace(HYBRID, mixers=("propagation",))), tmp_path / "student.pt2"
    export_model(encoder, path, format="aot", max_size=48, max_batch=4)
    check(path, encoder, ["tokens", "pooled"])


def test_onnx_holds_standard_operators_alone_and_the_embedding_of_an_image_text_model(tmp_path):
    onnx = pytest.importorskip("onnx")
    model = DualEncoder(awake(replace(HYBRID, mixers=("propagation",))), TextTower(TextConfig(8, 1, 2)), 6)
    export_model(model, tmp_path / "x.onnx", min_size=8, max_size=8, max_batch=1)  # everything fixed
    graph = onnx.load(tmp_path / "x.onnx")
    onnx.checker.check_model(graph)
    assert {opset.domain for opset in graph.opset_import} == {""}
    assert not graph.functions
    assert sum(node.op_type == "Scan" for node in graph.graph.node) == 4
    images = torch.randn(1, 3, 8, 8)
    _, _, embedding = load_exported(tmp_path / "x.onnx")(images)
    assert (embedding - model.encode_image(images)).norm() < 1e-5


def test_a_file_that_is_wrong_is_not_kept(tmp_path, monkeypatch):
    """A format that writes another encoder than it was given: the check must see it, and nothing may stay."""

    def wrong(side, bounds, path, say):
        with torch.no_grad():
            torch.save([output + 1e-2 for output in side(torch.zeros(1, 3, 8, 8))], path)

    monkeypatch.setitem(formats_module.WRITERS, "torch", wrong)
    monkeypatch.setattr("cgspn.export.export.open_file", lambda path, format: lambda images: torch.load(path))
    options = {"format": "torch", "min_size": 8, "max_size": 8, "max_batch": 1}
    with pytest.raises(ExportError, match=r"the torch program differs from the encoder by .*; accepted: 1e-04"):
        export_model(awake(HYBRID), tmp_path / "x.pt2", **options)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "x.pt2").write_text("an older file")
    with pytest.raises(ExportError):
        export_model(awake(HYBRID), tmp_path / "x.pt2", **options)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["an older file"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("x.pt2", {}, r"out is .*x.pt2; a file of format 'onnx' ends in .onnx"),
        ("x.onnx", {"format": "tensorrt"}, "format is 'tensorrt'; accepted: 'onnx', 'torch', 'aot'"),
        ("x.onnx", {"min_size": 6}, "min_size is 6; accepted: multiples of the patch size 4"),
        ("x.onnx", {"min_size": 16, "max_size": 8}, "min_size is 16, above max_size 8"),
        ("x.onnx", {"max_batch": 0}, "max_batch is 0; accepted: from 1 up"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_written(name, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_model(Encoder(HYBRID), tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"needs onnxruntime; install cgspn\[export\]"):
        export_model(Encoder(HYBRID), tmp_path / "x.onnx")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler: install g\+\+ or clang"):
        export_model(Encoder(HYBRID), tmp_path / "x.pt2", format="aot")
    assert list(tmp_path.iterdir()) == []


def test_bounds_cover_the_corners_and_the_native_size():
    bounds = bounds_for(HYBRID)
    assert bounds.grid == (1, 10)
    assert bounds.sizes((16, 20))[:2] == [(32, 4, 4), (1, 4, 40)]
    assert (2, 16, 20) in bounds.sizes((16, 20))
    for batch, height, width in bounds.sizes((16, 20)):
        bounds.check(torch.zeros(batch, 3, height, width))


def test_an_onnx_graph_names_its_axes_and_refuses_other_sizes(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    export_model(awake(HYBRID).eval(), tmp_path / "m.onnx", min_size=8, max_size=24, max_batch=2)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert session.get_outputs()[0].shape[:3] == ["batch", "rows", "columns"]
    for shape in ((3, 3, 8, 8), (0, 3, 8, 8), (1, 3, 9, 8), (1, 3, 8, 32), (1, 3, 4, 8)):
        with pytest.raises(Exception, match="sides_8_to_24_in_steps_of_4"):
            session.run(None, {"images": torch.zeros(shape).numpy()})
