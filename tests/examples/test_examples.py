"""The examples run in small and end with the numbers that they should."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def photographs(tmp_path):
    random = np.random.default_rng(0)
    for number in range(12):
        picture = Image.fromarray(random.integers(0, 255, (3, 4, 3), dtype=np.uint8)).resize((64, 48))
        (tmp_path / "photos").mkdir(exist_ok=True)
        picture.save(tmp_path / "photos" / f"{number}.jpg")
    return tmp_path / "photos"


def test_every_example_is_listed_and_tested():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"{name}.py" in listed for name in names)
    assert all(f'load("{name}")' in Path(__file__).read_text() for name in names)


@pytest.mark.slow
def test_operator_in_a_network_learns():
    assert load("operator_in_a_network").main(["--steps", "25"]) > 0.25  # 0.1 by chance


def test_distill_photographs_brings_the_student_nearer(photographs, tmp_path):
    out = tmp_path / "student"
    before, after = load("distill_photographs").main(
        [str(photographs), "--out", str(out), "--steps", "6", "--batch", "8"]
    )
    assert after > before + 0.1
    assert (out / "model.safetensors").is_file()


@pytest.mark.slow
def test_dense_prediction_finds_the_shapes():
    arguments = ["--size", "70", "--steps", "40", "--accumulate", "1"]
    assert load("dense_prediction").main(arguments) > 0.55  # 0.3 if all were ground


@pytest.mark.slow
def test_dense_prediction_at_1036_px():
    assert (
        0 <= load("dense_prediction").main(["--size", "1036", "--steps", "1", "--accumulate", "1", "--limit", "1"]) <= 1
    )


def test_llava_answers_about_images_of_any_size():
    pytest.importorskip("transformers")
    assert load("llava_vision_tower").main([]) == {"56 x 56": [2, 4], "84 x 140": [2, 4]}


def test_served_vectors_are_the_encoders():
    assert load("serve_cuda_graphs").main(["--sizes", "56", "84", "--repeats", "1"]) < 0.02  # bfloat16 on a GPU


@pytest.mark.slow
def test_onnx_runtime_gives_what_pytorch_gives():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert load("onnx_runtime").main([]) < 1e-4
