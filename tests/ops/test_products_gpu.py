"""Products that are prepared give what PyTorch's give."""

import pytest
import torch
from torch.nn.functional import gelu, linear

from cgspn.ops.gpu import gpu_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 729, 5476])
def test_a_prepared_product_is_pytorchs(dtype, rows):
    torch.manual_seed(0)
    gpu, stream = gpu_of(torch.device("cuda")), torch.cuda.current_stream().cuda_stream
    wide = torch.randn(rows, 1408, device="cuda", dtype=dtype)
    x, weight = wide[:, :1152], torch.randn(4304, 1152, device="cuda", dtype=dtype) / 34
    bias, before = torch.randn(4304, device="cuda", dtype=dtype), torch.randn(rows, 4304, device="cuda", dtype=dtype)
    scratch = torch.empty(1 << 25, device="cuda", dtype=torch.uint8)
    plain = linear(x.double(), weight.double())
    wanted = {
        (False, False, True): plain + bias,
        (True, False, True): gelu(plain + bias, approximate="tanh"),
        (False, True, False): plain + before,
    }
    for (through, onto, biased), want in wanted.items():
        out = before.clone()
        options = {"bias": bias if biased else None, "add": out if onto else None, "gelu": through}
        product = gpu.product(stream, scratch, x, weight.t(), out, **options)
        assert product is not None
        assert product.run() == 0
        other = before.clone()
        product.pointers[2].value = other.data_ptr()
        assert product.run() == 0
        assert torch.equal(out, other)
        assert float((out.double() - want).norm() / want.norm()) < (1e-3 if dtype == torch.float16 else 5e-3)


def test_products_of_a_backward_pass():
    torch.manual_seed(0)
    gpu, stream = gpu_of(torch.device("cuda")), torch.cuda.current_stream().cuda_stream
    d, x, weight = (torch.randn(n, m, device="cuda").bfloat16() for n, m in ((5476, 192), (5476, 64), (192, 64)))
    scratch = torch.empty(1 << 25, device="cuda", dtype=torch.uint8)
    more = torch.randn(5476, 64, device="cuda").bfloat16()
    for a, b, add in ((d, weight, None), (d, weight, more), (d.t(), x, None)):
        out = torch.empty(a.shape[0], b.shape[1], device="cuda", dtype=torch.bfloat16)
        product = gpu.product(stream, scratch, a, b, out, add=add)
        assert product.run() == 0
        want = a.double() @ b.double() + (0 if add is None else add.double())
        assert float((out.double() - want).norm() / want.norm()) < 5e-3


def test_what_the_library_does_not_take_is_left_to_pytorch():
    gpu, stream = gpu_of(torch.device("cuda")), torch.cuda.current_stream().cuda_stream
    x = torch.randn(4, 8, device="cuda")
    assert (
        gpu.product(stream, torch.empty(0, device="cuda", dtype=torch.uint8), x, x.t(), x[:, :4].contiguous()) is None
    )
