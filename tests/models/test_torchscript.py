"""torch.jit.trace and dynamic int8: older ways to run an encoder elsewhere."""

import io
import warnings

import pytest
import torch

import cgspn

warnings.filterwarnings("ignore", category=DeprecationWarning)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["cgspn_mini_patch4_28", "hybrid_mini_patch4_28", "vit_mini_patch4_28"])
@pytest.mark.parametrize("size", [(12, 20), (28, 28)])  # the latter is the native one
def test_a_trace_takes_every_size_and_has_the_gradients(name, size):
    torch.manual_seed(0)
    encoder = cgspn.create_model(name).eval()
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(encoder, torch.randn(2, 3, *size)), buffer)
    buffer.seek(0)
    program = torch.jit.load(buffer)
    images = torch.randn(3, 3, 28, 24)
    for ours, theirs in zip(encoder(images), program(images), strict=True):
        torch.testing.assert_close(ours, theirs)
    encoder(images).pooled.square().sum().backward()
    program(images)[1].square().sum().backward()
    own = dict(encoder.named_parameters())
    for key, parameter in program.named_parameters():
        torch.testing.assert_close(parameter.grad, own[key].grad)


@pytest.mark.filterwarnings("ignore")
def test_products_run_in_dynamic_int8():
    torch.manual_seed(0)
    encoder = cgspn.create_model("hybrid_mini_patch4_28").eval()
    quantised = torch.ao.quantization.quantize_dynamic(encoder, {torch.nn.Linear}, dtype=torch.qint8)
    images = torch.randn(2, 3, 12, 20)
    with torch.no_grad():
        for ours, theirs in zip(encoder(images), quantised(images), strict=True):
            assert (ours - theirs).norm() < 0.1 * ours.norm()
