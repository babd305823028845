"""A feed on a GPU: what a CPU gets, from page-locked memory, and no waiting where workers keep up."""

import pytest
import torch
from PIL import Image

from cgspn.data import LoaderConfig, open_samples
from cgspn.distill import OptimConfig, SampleFeed, World
from cgspn.models import create_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def test_a_gpu_gets_what_a_cpu_gets(tmp_path):
    for i in range(30):
        Image.effect_noise((60, 50), 20 + i).convert("RGB").save(tmp_path / f"{i}.png")
    config = create_model("vit_mini_patch4_28").config
    optim = OptimConfig(steps=8, batch_size=8, jitter=0.3)
    streams = [
        SampleFeed(open_samples(str(tmp_path)), LoaderConfig(workers=2)).stream(
            config, (28, 28), optim, World(device=d)
        )
        for d in (torch.device("cpu"), torch.device("cuda"))
    ]
    for cpu, gpu in zip(streams[0](0), streams[1](0), strict=True):
        assert gpu.images.is_cuda
        assert torch.equal(cpu.indices, gpu.indices)
        torch.testing.assert_close(gpu.images.cpu(), cpu.images, rtol=1e-5, atol=1e-5)
