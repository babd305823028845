"""Streams from worker processes: the same whoever reads them, whatever is damaged, whoever dies."""

import io
import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from shard_files import members, picture, write_shards, write_tar

from cgspn.data import BatchPlan, LoaderConfig, SkipCounter, WorkerError, open_samples, read_rows
from cgspn.data import workers as workers_module

CPU = torch.device("cpu")
PLAN = BatchPlan(batch_size=8, rows=(0, 8), size=(10, 14), seed=3)


@pytest.fixture
def source(tmp_path):
    return open_samples(write_shards(tmp_path), cache=tmp_path / "cache")


def read(source, plan=PLAN, start=0, end=9, workers=0):
    return list(read_rows(source, plan, start, end, workers=workers, prefetch=2, device=CPU))


def same(stream, other):
    assert [step for step, _ in stream] == [step for step, _ in other]
    for (_, a), (_, b) in zip(stream, other):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.indices, b.indices)
        assert list(a.captions) == list(b.captions)
        assert [tuple(f) for f in a.failures] == [tuple(f) for f in b.failures]


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_do_not_change_the_stream(source, workers):
    before = torch.get_rng_state()
    same(read(source), read(source, workers=workers))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 3])
def test_a_batch_in_parts_is_the_batch(source, monkeypatch, workers):
    whole = read(source)
    monkeypatch.setattr(workers_module, "PART_IMAGES", 3)
    assert [part.stop - part.start for part in PLAN.parts(0)] == [3, 3, 2]
    same(whole, read(source, workers=workers))
    monkeypatch.setattr(workers_module, "PART_PIXELS", 10 * 14 * 2)
    assert len(PLAN.parts(0)) == 4
    assert len(replace(PLAN, size=(100, 100)).parts(0)) == 8  # one image, however large


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_at_any_step(source, workers):
    whole = read(source)
    for start in range(9):
        same(whole[start:], read(source, start=start, workers=workers if start % 4 == 3 else 0))


def test_processes_share_a_batch_between_them(source):
    whole = read(source)
    halves = [read(source, replace(PLAN, rows=rows)) for rows in ((0, 4), (4, 8))]
    for (_, batch), (_, first), (_, second) in zip(whole, *halves):
        assert torch.equal(batch.images, torch.cat([first.images, second.images]))
        assert batch.captions == first.captions + second.captions


def test_every_epoch_shows_every_picture_with_its_caption(source):
    stream = read(source, end=15)
    indices = torch.cat([rows.indices for _, rows in stream])
    assert (indices.view(4, 30).sort(1).values == torch.arange(30)).all()
    for _, rows in stream:
        assert rows.captions == [f"picture {i}" for i in rows.indices.tolist()]
        # the frame or the middle of picture i; JPEG is not exact
        for i, image in zip(rows.indices.tolist(), rows.images.float()):
            middle = image[4:6, 6:8].mean((0, 1))
            assert (middle - torch.tensor([10.0 * (i % 25), 255.0 - i, 0.0])).abs().max() < 12


def test_crops_are_other_ones_in_the_next_epoch_and_the_middle_without_augmentation(source):
    stream = [rows for _, rows in read(source, end=15)]
    images = {}
    for rows in stream:
        for i, image in zip(rows.indices.tolist(), rows.images):
            images.setdefault(i, []).append(image)
    different = [len({image.numpy().tobytes() for image in crops}) for crops in images.values()]
    assert min(different) > 1
    assert sum(different) > 0.9 * 120  # a small picture has few boxes
    plain = read(source, replace(PLAN, augment=False), end=4)
    for _, rows in plain:
        for i, image in zip(rows.indices.tolist(), rows.images.numpy()):
            whole = Image.open(io.BytesIO(picture(i)))
            height = 24 * 10 / 14
            box = (0, (18 - height) / 2, 24, (18 + height) / 2)
            assert np.array_equal(image, np.array(whole.resize((14, 10), Image.Resampling.BILINEAR, box)))


def test_a_random_box_is_cut_from_the_original_pixels(tmp_path):
    # a ramp tells where a crop comes from, and the mirrored ones run the other way
    ramp = np.zeros((100, 200, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(200), np.arange(100)[:, None]
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    plan = BatchPlan(200, (0, 200), (20, 20), 0, scale=(0.2, 0.5))
    ((_, rows),) = read(open_samples(str(tmp_path)), plan, end=1)
    x, y = rows.images[:, 10, :, 0].float(), rows.images[:, :, 10, 1].float()
    mirrored = x[:, -1] < x[:, 0]
    assert 70 < int(mirrored.sum()) < 130
    width, height = (x[:, -1] - x[:, 0]).abs() * 20 / 19, (y[:, -1] - y[:, 0]) * 20 / 19
    area = width * height / 20_000
    assert 0.18 < float(area.min()) < 0.25
    assert 0.42 < float(area.max()) < 0.53
    assert float((width / height).log().abs().max()) < np.log(4 / 3) + 0.1


def test_large_jpegs_are_decoded_small_and_turned(tmp_path):
    # draft mode, Exif orientation and the box must agree: bright on the left of the upright picture
    stored = np.zeros((600, 1000, 3), np.uint8)
    stored[300:] = 255  # turned by 90 degrees clockwise, the bottom comes to the left
    image = Image.fromarray(stored)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    for augment in (False, True):
        plan = BatchPlan(4, (0, 4), (50, 30), 0, augment=augment, scale=(0.9, 1.0))
        ((_, rows),) = read(open_samples(str(tmp_path)), plan, end=1)
        for image in rows.images.float():
            left, right = image[:, :8].mean(), image[:, -8:].mean()
            assert abs(left - right) > 200
            if not augment:
                assert left > right
            assert abs(image[:10].mean() - image[-10:].mean()) < 3


def damaged_shards(folder):
    contents = dict(members(range(40)))
    contents["0003.jpg"] = contents["0003.jpg"][:200]
    contents["0011.jpg"] = b""
    contents["0020.jpg"] = b"<html>gone</html>"
    write_tar(folder / "damaged.tar", contents.items())
    return open_samples(str(folder / "damaged.tar"), cache=folder / "cache")


def test_damaged_pictures_are_replaced_by_others_and_named(tmp_path):
    source = damaged_shards(tmp_path)
    stream = read(source, end=5)
    same(stream, read(source, end=5, workers=2))
    failures = [failure for _, rows in stream for failure in rows.failures]
    assert {number for number, _, _ in failures} == {3, 11, 20}
    assert {name.split(": ")[1] for _, name, _ in failures} == {"0003", "0011", "0020"}
    assert all("Error" in reason for _, _, reason in failures)
    shown = torch.cat([rows.indices for _, rows in stream])
    assert not set(shown.tolist()) & {3, 11, 20}
    assert len(shown) == 40
    for _, rows in stream:
        assert rows.captions == [f"picture {i}" for i in rows.indices.tolist()]
    # the replacement depends on the picture alone: epoch after epoch it is the same
    second = [rows for _, rows in read(source, start=5, end=10)]
    assert sorted(torch.cat([rows.indices for rows in second]).tolist()) == sorted(shown.tolist())
    # and the places of all others are what they are without damage
    write_tar(tmp_path / "whole.tar", members(range(40)))
    whole = read(open_samples(str(tmp_path / "whole.tar"), cache=tmp_path / "cache"), end=5)
    for (_, a), (_, b) in zip(stream, whole):
        good = a.indices == b.indices
        assert torch.equal(a.images[good], b.images[good])
        assert set(b.indices[~good].tolist()) <= {3, 11, 20}


def test_a_shard_lost_between_two_steps_is_skipped(tmp_path):
    source = open_samples(write_shards(tmp_path), cache=tmp_path / "cache")
    whole = read(source, end=6)
    stream = read_rows(source, PLAN, 0, 6, workers=0, prefetch=2, device=CPU)
    got = [next(stream) for _ in range(2)]
    (tmp_path / "shard-1.tar").unlink()
    got += list(stream)
    failed = {number for _, rows in got for number, _, _ in rows.failures}
    assert failed <= set(range(10, 20))
    assert failed
    for (_, a), (_, b) in zip(got[2:], whole[2:]):
        kept = (b.indices < 10) | (b.indices >= 20)
        assert torch.equal(a.images[kept], b.images[kept])


def test_nothing_readable_ends_the_stream_without_an_image(tmp_path):
    write_tar(tmp_path / "x.tar", [(f"{i}.jpg", b"no image") for i in range(5)])
    ((_, rows), *_) = read(open_samples(str(tmp_path / "x.tar"), cache=tmp_path / "cache"), end=1, workers=1)
    assert rows.images is None
    assert len(rows.failures) == workers_module.SUBSTITUTES


def test_images_without_captions_are_skipped_where_captions_are_wanted(tmp_path):
    contents = [pair for pair in members(range(20)) if pair[0] != "0007.txt"]
    write_tar(tmp_path / "x.tar", contents)
    source = open_samples(str(tmp_path / "x.tar"), cache=tmp_path / "cache")
    wanted = [rows for _, rows in read(source, replace(PLAN, captioned=True), end=5)]
    assert {number for rows in wanted for number, _, _ in rows.failures} == {7}
    assert "no caption" in next(reason for rows in wanted for _, _, reason in rows.failures)
    assert all(all(rows.captions) for rows in wanted)
    assert not [f for _, rows in read(source, end=5) for f in rows.failures]


def test_class_names_become_captions(tmp_path):
    for i, name in enumerate(["cat", "owl"] * 10):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / f"{i}.png").write_bytes(picture(i, kind="PNG"))
    (tmp_path / "owl" / "1.txt").write_text("a caption of its own")
    stream = [rows for _, rows in read(open_samples(str(tmp_path)), replace(PLAN, captioned=True), end=10)]
    captions = {c for rows in stream for c in rows.captions}
    assert "a caption of its own" in captions
    assert {"a photo of a cat", "a photo of an owl"} <= captions
    assert len(captions) > 6  # templates vary
    for rows in stream:
        for label, caption in zip(rows.labels.tolist(), rows.captions):
            assert ("cat", "owl")[label] in caption if label >= 0 else caption == "a caption of its own"


def test_the_limit_is_a_share_of_what_was_read():
    counter = SkipCounter("photos", 50, 0.1)
    for epoch in range(3):  # the same five pictures, epoch after epoch: 10%, not more
        for i in range(5):
            counter.add(9, [(i, f"name {i}", "OSError: torn")])
        assert len(counter.report()) == 5, epoch
    assert counter.report().total == 50
    with pytest.raises(ValueError, match=r"photos: 6 of the 50 images.*more than 10% \(max_skipped\).*name 0: OSError"):
        counter.add(0, [(5, "name 5", "gone")])
    # a large source that went bad stops soon, not after a tenth of it
    large = SkipCounter("x", 10**8, 0.1)
    large.add(10_000, [])
    with pytest.raises(ValueError, match="x: "):
        large.add(0, [(i, str(i), "gone") for i in range(1200)])


class Slow:
    """A source that takes its time, and tells which process reads."""

    def __init__(self, source, folder, seconds=0.02):
        self.inner, self.folder, self.seconds = source, folder, seconds
        self.source, self.problems = source.source, source.problems

    def __len__(self):
        return len(self.inner)

    def name(self, number):
        return self.inner.name(number)

    def read(self, number):
        (self.folder / str(os.getpid())).touch()
        time.sleep(self.seconds)
        return self.inner.read(number)

    def digest(self):
        return self.inner.digest()


def readers(folder):
    return {int(p.name) for p in folder.iterdir()}


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow  # the loader looks for dead workers every five seconds
def test_a_killed_worker_is_replaced_and_nothing_is_lost(source, tmp_path, capfd):
    (tmp_path / "pids").mkdir()
    slow = Slow(source, tmp_path / "pids")
    handler = signal.getsignal(signal.SIGCHLD)
    stream = read_rows(slow, PLAN, 0, 9, workers=2, prefetch=1, device=CPU)
    got = [next(stream), next(stream)]
    first = readers(tmp_path / "pids")
    os.kill(min(first), signal.SIGKILL)
    began = time.monotonic()
    got += list(stream)
    assert time.monotonic() - began < 30
    same(read(source), got)
    assert "restarted at step" in capfd.readouterr().err
    assert len(readers(tmp_path / "pids") - first) >= 1
    assert not any(alive(pid) for pid in readers(tmp_path / "pids"))
    assert signal.getsignal(signal.SIGCHLD) is handler


class Deadly(Slow):
    def read(self, number):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_workers_that_keep_dying_end_the_run_with_one_line(source, tmp_path):
    began = time.monotonic()
    with pytest.raises(WorkerError, match=r"^a reader process died twice at step 4 .*fewer workers"):
        read(Deadly(source, tmp_path), start=4, workers=2)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("taken", [0, 1, 9])
def test_workers_are_gone_soon_after_a_stream_is_left(source, tmp_path, taken):
    (tmp_path / "pids").mkdir()
    stream = read_rows(Slow(source, tmp_path / "pids"), PLAN, 0, 9, workers=3, prefetch=2, device=CPU)
    for _ in range(taken):
        next(stream)
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 5
    assert not any(alive(pid) for pid in readers(tmp_path / "pids"))


@pytest.mark.parametrize(
    ("settings", "name"), [({"workers": -1}, "workers"), ({"prefetch": 0}, "prefetch"), ({"max_skipped": 2}, "max_sk")]
)
def test_wrong_settings_are_named(settings, name):
    with pytest.raises(ValueError, match=f"^{name}"):
        LoaderConfig(**settings)


def test_workers_share_the_cores_of_the_machine():
    cores = len(os.sched_getaffinity(0))
    assert LoaderConfig().workers_for(1) == min(16, cores)
    assert LoaderConfig().workers_for(10 * cores) == 1
    assert LoaderConfig(workers=0).workers_for(1) == 0
