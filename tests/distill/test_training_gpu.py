"""Training on a GPU: captured and compiled steps against plain ones."""

from dataclasses import replace

import pytest
import torch

from cgspn.bench.train import TrainBenchConfig, run
from cgspn.data import Batch, load_embedded, scheduled
from cgspn.distill import ComputeConfig, DistillConfig, HighResConfig, LossConfig, OptimConfig, SizeRange, distill
from cgspn.distill.batches import batch_shapes
from cgspn.distill.flops import peak_of
from cgspn.models import create_model
from cgspn.teachers import convert, load_embedded_teacher

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def distilled(compute, accumulate=1, sizes=None):
    torch.manual_seed(0)
    teacher = load_embedded_teacher().cuda()
    student = convert(teacher.image, compression=4).cuda()
    stage = OptimConfig(steps=24 if sizes else 12, batch_size=32, learning_rate=1e-3, accumulate=accumulate)
    images = load_embedded("train").subset(torch.arange(512))
    return distill(teacher, student, images, DistillConfig(stage1=stage, stage2=stage, sizes=sizes, compute=compute))


def losses(compute, accumulate=1, sizes=None):
    return torch.tensor([history.curve("total") for history in distilled(compute, accumulate, sizes)])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_captured_step_is_the_plain_one(precision, accumulate):
    plain = ComputeConfig(precision=precision)
    ours, theirs = losses(replace(plain, capture=True), accumulate), losses(plain, accumulate)
    torch.testing.assert_close(ours, theirs, rtol=1e-4 if precision == "float32" else 2e-2, atol=0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_captured_steps_of_mixed_shapes_are_the_plain_ones(precision):
    plain = ComputeConfig(precision=precision)
    sizes = SizeRange(16, 44, 3, aspects=(1.0, 2.0))
    ours, theirs = (losses(compute, 2, sizes) for compute in (replace(plain, capture=True), plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4 if precision == "float32" else 2e-2, atol=0)


def test_captions_alone_are_learned_at_mixed_sizes_in_bfloat16():
    none, stage = OptimConfig(steps=0), OptimConfig(steps=12, batch_size=32, learning_rate=1e-3)
    config = DistillConfig(
        stage1=none, stage2=none, loss=LossConfig(contrastive=1), highres=HighResConfig((44,), "none", 0.5, stage)
    )

    def curve(precision):
        torch.manual_seed(0)
        teacher = load_embedded_teacher().cuda()
        student, images = convert(teacher.image, compression=4), load_embedded("train").subset(torch.arange(512))
        [history] = distill(teacher, student, images, replace(config, compute=ComputeConfig(precision)))
        return torch.tensor(history.curve("contrastive"))

    torch.testing.assert_close(curve("bfloat16"), curve("float32"), rtol=3e-2, atol=0)


def test_compiled_steps_of_mixed_shapes_are_the_plain_ones():
    sizes = SizeRange(16, 44, 3)
    ours, theirs = (losses(ComputeConfig(compile=compiled), sizes=sizes) for compiled in (True, False))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)


@pytest.mark.slow
def test_mixed_shapes_cost_little_throughput():
    def rates(sizes):
        torch.manual_seed(0)
        teacher = create_model("vit_small_patch14_378", image_size=(224, 224)).cuda().eval()
        student = convert(teacher, compression=6, value_expansion=6).cuda()
        optim = OptimConfig(steps=0, batch_size=64)
        stage = replace(optim, steps=120, augment=False)
        compute = ComputeConfig(precision="bfloat16", capture=True)
        config = DistillConfig(stage1=optim, stage2=stage, sizes=sizes, compute=compute)
        [history] = distill(teacher, student, Ready(), config)
        return history.throughput["tokens_per_second"]

    fixed = rates(None)
    assert rates(SizeRange()) > 0.9 * fixed


class Ready:
    """A feed whose images need no time."""

    def stream(self, encoder, size, optim, world, sizes=None):
        shapes = batch_shapes(encoder, size, optim, 1, sizes)
        images = {shape: torch.randn(shape.images, 3, *shape.size, device="cuda") for shape in shapes}

        def start_at(start):
            for step in range(start, optim.steps):
                shape, _ = scheduled(shapes, optim.seed, step)
                rows = torch.arange(shape.images)
                yield Batch(step, rows, images[shape], rows)

        return start_at

    def captions(self, batch):
        return []


def test_a_compiled_step_is_the_plain_one():
    torch.testing.assert_close(losses(ComputeConfig(compile=True)), losses(ComputeConfig()), rtol=1e-3, atol=0)


def test_recomputed_activations_give_the_plain_step():
    torch.testing.assert_close(losses(ComputeConfig(checkpointing=True)), losses(ComputeConfig()), rtol=1e-4, atol=0)


@pytest.mark.skipif(
    not torch.cuda.is_available() or peak_of(torch.device("cuda"), "bfloat16") is None, reason="an unknown GPU"
)
def test_a_known_gpu_has_an_mfu_below_one():
    for history in distilled(ComputeConfig(precision="bfloat16")):
        assert 0 < history.throughput["mfu"] < 1


def test_the_largest_batch_and_its_memory_are_found(tmp_path):
    config = TrainBenchConfig("vit_tiny_patch14_378", "cgspn_tiny_patch14_378", (224,), largest=6, steps=2)
    [row] = run(config, tmp_path, torch.device("cuda"), commit="none", say=lambda _: None)
    assert row["largest batch"] == "6 or more"
    assert row["images/s"] > 0
    assert 0.01 < row["peak memory (GiB)"] < 20
