"""Training at mixed sizes: shapes, budget, the same stream everywhere, exact resumption, what a student records."""

import math
from dataclasses import replace

import pytest
import torch
from PIL import Image

import cgspn
from cgspn.commands.command import parsed
from cgspn.commands.distill import Distill
from cgspn.commands.pretrain import Pretrain
from cgspn.data import Batch, LoaderConfig, load_embedded, open_samples, scheduled
from cgspn.distill import (
    ComputeConfig,
    DistillConfig,
    HighResConfig,
    ImageSetFeed,
    LossConfig,
    OptimConfig,
    PretrainConfig,
    SampleFeed,
    SizeRange,
    World,
    distill,
    pretrain,
)
from cgspn.distill.batches import batch_shapes
from cgspn.distill.cache import TeacherCache
from cgspn.distill.plan import plan
from cgspn.distill.resume import carried_from, read_tensors
from cgspn.distill.sizes import tokens_of
from cgspn.distill.taps import tapped_forward
from cgspn.distill.tasks import SublayerTask, inherited_before
from cgspn.distill.throughput import Step, Throughput
from cgspn.layers import AttentionConfig
from cgspn.models import Encoder, TextConfig, build_dual, model_config
from cgspn.teachers import convert

SMALL = {"width": 32, "mixers": ("attention",) * 2, "mlp_hidden": 64, "attention": AttentionConfig(heads=2)}
SIZES = SizeRange(16, 40, count=3, aspects=(1.0, 2.0))
OPTIM = OptimConfig(steps=9, batch_size=16, learning_rate=1e-3, seed=3)


def config(**changes):
    return model_config("vit_mini_patch4_28", **SMALL, **changes)


@pytest.fixture
def images():
    return load_embedded("train").subset(torch.arange(200))


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(30):
        Image.effect_noise((60, 48), 60).convert("RGB").save(folder / f"{i:02d}.png")
    return open_samples(str(folder))


def pair():
    torch.manual_seed(0)
    teacher = Encoder(config()).eval()
    return teacher, convert(teacher, compression=4)


def test_sides_are_even_in_log_scale_and_shapes_keep_the_area():
    assert SizeRange().sides(14) == (112, 168, 238, 364, 532, 784)
    assert SizeRange(largest=448).sides(14) == (112, 154, 196, 252, 336, 448)
    assert SizeRange(200, 210, count=5).sides(14) == (196, 210)
    assert SizeRange(5, 5, count=1).sides(14) == (14,)
    shapes = SizeRange(112, 448, count=3, aspects=(1.0, 0.5, 2.0)).shapes(14)
    assert len(set(shapes)) == len(shapes) == 9
    for height, width in shapes:
        assert height % 14 == width % 14 == 0
        assert min(abs(math.log(height * width / side**2)) for side in (112, 224, 448)) < 0.1
    assert (154, 322) in shapes  # 224 px twice as wide as high
    with pytest.raises(ValueError, match=r"smallest is 300; accepted: 1 to largest, 200"):
        SizeRange(300, 200)
    with pytest.raises(ValueError, match="aspects is"):
        SizeRange(aspects=(0.0,))


def test_a_batch_has_the_same_tokens_at_every_size():
    optim = OptimConfig(batch_size=64)
    shapes = batch_shapes(config(patch_size=14, image_size=(224, 224)), (224, 224), optim, 1, SizeRange(largest=448))
    assert {shape.size[0]: shape.images for shape in shapes} == {112: 256, 154: 136, 196: 80, 252: 48, 336: 32, 448: 16}
    for shape in shapes:
        assert abs(shape.images * tokens_of(shape.size, 14) / (64 * 256) - 1) < 0.15


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_any_number_of_processes_up_to_eight_takes_the_same_batches(processes):
    for optim in (OPTIM, replace(OPTIM, batch_size=64, mixup=0.5)):
        alone, together = (batch_shapes(config(), (28, 28), optim, count, SIZES) for count in (1, processes))
        assert alone == together or (optim.mixup and processes == 8)
        assert all(shape.images >= processes * (2 if optim.mixup else 1) for shape in together)


def test_odd_numbers_of_processes_and_parts_divide_every_batch():
    optim = OptimConfig(batch_size=24, accumulate=2)
    assert all(shape.images % 6 == 0 for shape in batch_shapes(config(), (28, 28), optim, 3, SIZES))


def test_each_shape_comes_once_a_turn_and_positions_add_up():
    shapes = batch_shapes(config(), (28, 28), OPTIM, 1, SIZES)
    found = [scheduled(shapes, 3, step) for step in range(5 * len(shapes))]
    position = 0
    for shape, begin in found:
        assert begin == position
        position += shape.images
    turns = [[shape for shape, _ in found[i : i + len(shapes)]] for i in range(0, len(found), len(shapes))]
    assert all(sorted(turn) == sorted(shapes) for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1
    assert scheduled(shapes, 3, 100_000_007)[1] > 0  # no sum over the steps before it


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_processes_and_starts_see_parts_of_one_stream(kind, images, photos):
    optim = replace(OPTIM, jitter=0.3, mixup=0.6, cutmix=0.6)
    feed = ImageSetFeed(images) if kind == "memory" else SampleFeed(photos, LoaderConfig(workers=0))
    encoder = config()

    def stream(rank, size, start):
        return list(feed.stream(encoder, (28, 28), optim, World(rank, size), SIZES)(start))

    alone = stream(0, 1, 0)
    assert len({batch.images.shape for batch in alone}) == len(SIZES.shapes(4)) > 3
    for batch, *halves in zip(alone[4:], stream(0, 2, 4), stream(1, 2, 4), strict=True):
        assert torch.equal(batch.images, torch.cat([half.images for half in halves]))
        assert torch.equal(batch.indices, torch.cat([half.indices for half in halves]))


def test_any_number_of_workers_reads_the_same(photos):
    def read(workers):
        feed = SampleFeed(photos, LoaderConfig(workers=workers))
        return feed.stream(config(), (28, 28), replace(OPTIM, steps=5), World(), SIZES)(0)

    for one, other in zip(read(0), read(2), strict=True):
        assert one.step == other.step
        assert torch.equal(one.images, other.images)


def test_all_images_of_an_epoch_are_seen(images):
    optim = replace(OPTIM, steps=40)
    stream = ImageSetFeed(images).stream(config(), (28, 28), optim, World(), SIZES)(0)
    seen = torch.cat([batch.indices for batch in stream])
    assert torch.equal(seen[:200].sort().values, torch.arange(200))
    assert torch.equal(seen[200:400].sort().values, torch.arange(200))


class StopError(Exception):
    pass


def test_a_run_that_was_stopped_ends_bit_for_bit_the_same(images, tmp_path):
    short = replace(OPTIM, steps=5, batch_size=8)
    settings = DistillConfig(
        sizes=SizeRange(16, 40, 3),
        stage1=short,
        stage2=replace(short, mixup=0.5),
        highres=HighResConfig(sizes=(56,), optim=replace(short, steps=3)),
        compute=ComputeConfig(save_every=2),
    )
    teacher, student = pair()
    histories = distill(teacher, student, images, settings, folder=tmp_path / "whole")

    def stopping(stage, step):
        def watch(record):
            if record["step"] == step:
                raise StopError

        return lambda title, _: watch if title.endswith(stage) else lambda record: None

    for stop in (stopping("stage 2", 3), stopping("56 px", 1)):
        teacher, stopped = pair()
        with pytest.raises(StopError):
            distill(teacher, stopped, images, settings, stop, folder=tmp_path / "stopped")
    teacher, resumed = pair()
    again = distill(teacher, resumed, images, settings, folder=tmp_path / "stopped")
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), resumed.parameters(), strict=True))
    assert [h.steps for h in again] == [h.steps for h in histories]
    assert resumed.config == student.config
    assert student.config.trained_sizes == (16, 24, 36, 40, 56)
    assert student.config.image_size == (56, 56)


def test_a_student_records_its_sizes_and_keeps_its_positions(images, tmp_path):
    torch.manual_seed(0)
    teacher = Encoder(config()).eval()
    student = convert(teacher, compression=4, keep_positions=True)
    assert torch.equal(student.positions.table, teacher.positions.table)
    assert student.config.patch_bias == teacher.config.patch_bias
    pixels = torch.randn(1, 3, 20, 44)
    assert torch.equal(student.embed(pixels)[0], teacher.embed(pixels)[0])
    once = replace(OPTIM, steps=2)
    settings = DistillConfig(
        keep_positions=True,
        sizes=SizeRange(20, 40, 2),
        stage1=once,
        stage2=once,
        highres=HighResConfig((56,), optim=once),
    )
    distill(teacher, student, images, settings)
    assert student.config.trained_sizes == (20, 40, 56)
    assert student.config.image_size == student.patch_embed.img_size == (56, 56)
    assert student.config.position_table == (7, 7)
    student.save_pretrained(tmp_path)
    loaded = cgspn.load_encoder(tmp_path)
    assert loaded.config == student.config
    assert torch.equal(loaded(pixels).tokens, student(pixels).tokens)
    student.set_input_size((28, 44))
    assert student.positions.grid == (7, 11)
    assert Encoder(student.config).load_state_dict(student.state_dict())


def test_stages_with_nothing_to_learn_are_left_out(images, capsys):
    teacher = Encoder(config()).eval()
    student = convert(teacher, compression=4, keep_attention=2, keep_positions=True)
    task, nothing = SublayerTask(teacher, student), torch.zeros(2, dtype=torch.long)
    assert task.losses(Batch(0, nothing, torch.randn(2, 3, 28, 28), nothing))["total"] == 0
    [history] = distill(teacher, student, images, DistillConfig(stage1=OPTIM, stage2=replace(OPTIM, steps=2)))
    assert history.title == "student, stage 2"
    assert "student, stage 1: skipped, because it has nothing to learn" in capsys.readouterr().err


def test_pretraining_takes_sizes(images):
    model, history = pretrain(images, PretrainConfig(sizes=SizeRange(16, 32, 2), optim=replace(OPTIM, steps=4)))
    assert len(history.steps) == 4
    assert model.image.config.trained_sizes == (16, 32)


def test_the_teachers_features_are_kept_by_image_and_size():
    teacher = pair()[0].eval()
    small, large = torch.randn(4, 3, 16, 24), torch.randn(4, 3, 28, 28)
    cache, computed = TeacherCache(2**30), []

    def ask(images, *rows):
        def compute():
            computed.append(len(rows))
            return tapped_forward(teacher, images[list(rows)])

        return cache.taps(torch.tensor(rows), compute, tuple(images.shape[-2:]))

    first, other, again = ask(small, 0, 1), ask(large, 0, 1), ask(small, 1, 0)
    assert computed == [2, 2]
    assert (first.grid.height, first.grid.width, other.grid.height) == (4, 6, 7)
    assert torch.equal(first.tokens[[1, 0]], again.tokens)


def test_rates_count_what_each_step_did():
    clock = Throughput(peak=1e3)
    clock.steps = [Step(6, (4, 4), 24, 240, 0.5, 2.0), Step(2, (8, 8), 16, 160, 0.25, 1.0)] * 10
    assert clock.rates(clock.steps[:2]) == pytest.approx(
        {"images_per_second": 8 / 3, "data_wait_share": 0.25, "tokens_per_second": 40 / 3, "mfu": 400 / 3 / 1e3}
    )
    for i in (12, 15):  # new there: it is captured or compiled
        clock.steps[i] = clock.steps[i]._replace(size=(12, 12))
    assert clock.settled() == [clock.steps[i] for i in range(10, 20) if i not in (12, 15)]


def test_a_finished_student_goes_on_to_a_higher_resolution(images, tmp_path):
    teacher, student = pair()
    short = replace(OPTIM, steps=2, batch_size=8)
    start = DistillConfig(sizes=SizeRange(16, 28, 2), stage1=short, stage2=short)
    distill(teacher, student, images, start, folder=tmp_path)
    carried = carried_from(tmp_path)
    assert any("adapters" in name for name in carried)
    none = replace(OPTIM, steps=0)
    config = DistillConfig(stage1=none, stage2=none, highres=HighResConfig(sizes=(56,), optim=short))
    [stage] = plan(teacher, student, ImageSetFeed(images), config, "student", World())
    assert sorted(set(stage.shapes(4))) == [(16, 16), (28, 28), (56, 56)]
    [history] = distill(teacher, student, images, config, carried=carried)
    assert history.title == "student, 56 px"
    assert student.config.image_size == (56, 56)
    with pytest.raises(ValueError, match="carried holds"):
        distill(teacher, student, images, replace(config, loss=LossConfig(adapters=False)), carried=carried)


@pytest.mark.parametrize("teacher_of", ["original", "previous"])
def test_what_an_earlier_run_inherited_keeps_its_own_rate(images, tmp_path, teacher_of):
    """After stage 2 no weight equals the teacher's any more, but the same weights still count as inherited."""
    teacher, student = pair()
    short = replace(OPTIM, steps=2, batch_size=8)
    distill(teacher, student, images, DistillConfig(stage1=short, stage2=short), folder=tmp_path)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    none, frozen = replace(OPTIM, steps=0), replace(short, inherited_rate=0)
    highres = HighResConfig(sizes=(56,), teacher=teacher_of, optim=frozen)
    config = DistillConfig(stage1=none, stage2=none, highres=highres)
    distill(teacher, student, images, config, carried=carried_from(tmp_path))
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert any(".mixer." in name for name in changed)
    assert not any(".mlp." in name for name in changed)


def test_stage_1_of_a_later_run_keeps_the_record_of_inherited_weights(images, tmp_path):
    teacher, student = pair()
    short, none = replace(OPTIM, steps=1, batch_size=8), replace(OPTIM, steps=0)
    records = []
    for number, (first, second) in enumerate([(none, short), (short, none), (none, short)]):
        carried = carried_from(tmp_path / str(number - 1))
        config = DistillConfig(stage1=first, stage2=second)
        distill(teacher, student, images, config, carried=carried, folder=tmp_path / str(number))
        records.append(inherited_before(carried_from(tmp_path / str(number))))
    assert records[0] == records[1] == records[2]
    assert "blocks.0.mlp.fc1.weight" in records[0]


def test_a_run_goes_on_with_the_teacher_after_resolutions_without_one(images, tmp_path):
    """The stage in between compares nothing, and leaves the adapters of stage 2 and the record as they were."""
    torch.manual_seed(0)
    teacher = build_dual(config(), TextConfig(width=16, depth=1, heads=2), 16).eval()
    student = convert(teacher.image, compression=4)
    short, none = replace(OPTIM, steps=1, batch_size=8), replace(OPTIM, steps=0)
    alone = HighResConfig(sizes=(56,), teacher="none", optim=short)
    start = DistillConfig(stage1=short, stage2=short, highres=alone, loss=LossConfig(contrastive=0.5))
    distill(teacher, student, images, start, folder=tmp_path)
    carried = carried_from(tmp_path)
    stage2 = read_tensors(tmp_path / "stages" / "1" / "adapters.safetensors")
    assert any("adapters" in name for name in carried)
    assert carried.keys() == stage2.keys()
    assert all(torch.equal(carried[name], stage2[name]) for name in carried)
    higher = DistillConfig(stage1=none, stage2=none, highres=HighResConfig(sizes=(56,), optim=short))
    [history] = distill(teacher, student, images, higher, carried=carried)
    assert history.title == "student, 56 px"


def test_stage_1_of_a_later_run_leaves_kept_attention_as_it_is(images, tmp_path):
    """Stage 2 has trained it, so it no longer equals the teacher's, but it is still the teacher's layer."""
    teacher, _ = pair()
    student = convert(teacher, compression=4, keep_attention=[1])
    short, none = replace(OPTIM, steps=1, batch_size=8), replace(OPTIM, steps=0)
    distill(teacher, student, images, DistillConfig(stage1=short, stage2=short), folder=tmp_path)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    assert not torch.equal(before["blocks.1.mixer.qkv.weight"], teacher.state_dict()["blocks.1.mixer.qkv.weight"])
    again, carried = DistillConfig(stage1=short, stage2=none), carried_from(tmp_path)
    [stage] = plan(teacher, student, ImageSetFeed(images), again, "student", World(), carried)
    distill(teacher, student, images, again, carried=carried)
    changed = {name.split(".")[1] for name, now in student.state_dict().items() if not torch.equal(now, before[name])}
    assert sorted(map(int, changed)) == stage.learning == [0]


def test_the_command_line_takes_sizes():
    given = ["embedded", "out", "--preset", "vit-s14-study", "--sizes", "112", "448", "--aspects", "1", "1.5"]
    config = parsed(Distill, "cgspn distill", given).settings
    assert (config.sizes.smallest, config.sizes.largest, config.sizes.aspects) == (112, 448, (1.0, 1.5))
    assert config.stage1.optimizer == "muon"
    pretraining = parsed(Pretrain, "cgspn pretrain", ["out", "--sizes", "16", "32"])
    assert pretraining.config.sizes == SizeRange(16, 32)
    with pytest.raises(ValueError, match="smallest is 448; accepted: 1 to largest, 112 pixels"):
        parsed(Distill, "cgspn distill", ["embedded", "out", "--sizes", "448", "112"]).run()
