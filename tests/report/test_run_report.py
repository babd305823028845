"""The report of a distillation, from a record."""

from html.parser import HTMLParser

import pytest

pytest.importorskip("matplotlib")

from cgspn.report.run import rising, run_report

TAPS = [f"{tap} block {i}" for tap in ("PP", "PB") for i in range(3)]


def record(**changes):
    stage1 = [{"step": i, "lr": 1e-3, "gradient": 1.0, "total": 3.0 - i / 50} for i in range(100)]
    for step in stage1[::10]:  # a long stage keeps single blocks in some of its steps
        step |= {f"block {i}": 1.0 - step["step"] / 200 for i in (0, 2)}
    stage2 = [{"step": i, "lr": 1e-3, "gradient": 1.0, "total": 4.0, "PP": 1.0, "PB": 2.0} for i in range(5)]
    for step in stage2:
        step |= dict.fromkeys(TAPS, 0.5)
    speed = {"images_per_second": 1234.5, "data_wait_share": 0.031, "first_batch_seconds": 2.5, "curve": [1.0, 2.0]}
    return {
        "command": "cgspn distill vit out",
        "teacher": "vit & co",
        "data": "photos/",
        "versions": {"torch": "2.13"},
        "config": {"compression": 18, "stage1": {"steps": 100}, "highres": {"sizes": []}},
        "processes": 2,
        "device": "a device",
        "images": 4096,
        "skipped": {
            "images": {"count": 3, "of": 400, "files": {"<b>.jpg": "truncated"}},
            "shards": {"count": 0, "of": 2, "files": {}},
        },
        "throughput": {"student, stage 1": speed | {"mfu": 0.412}, "student, stage 2": {}},
        "losses": {"student, stage 1": stage1, "student, stage 2": stage2, "student, 56 px": []},
    } | changes


def test_a_student_is_compared_on_what_was_kept_out():
    held = {"cosine": 0.93214, "images": 16, "trained_on": False, "picture": "data:image/jpeg;base64,AAAA"}
    text = " ".join(Text(run_report(record(held_out=held))).words)
    assert "0.932" in text
    assert "16 held-out images" in text
    assert "data:image/jpeg;base64,AAAA" in run_report(record(held_out=held))
    assert "16 training images (there are fewer than 100)" in run_report(record(held_out=held | {"trained_on": True}))


def test_what_is_not_set_or_was_not_read_is_left_out_and_held_out_images_are_named():
    changed = record(
        config={"compression": None, "highres": {"teacher": "previous", "smaller": 0.0}},
        skipped={"images": {"count": 0, "of": 0, "files": {}}, "shards": {"count": 0, "of": 2, "files": {}}},
        held_out={"trained_on": False, "names": ["photos/0.jpg", "photos/100.jpg"]},
    )
    said = " ".join(Text(run_report(changed)).words)
    assert "compression" not in said
    assert "highres.smaller 0.0" in said
    assert "skipped images" not in said
    assert "skipped shards 0 of 2" in said
    assert "held out of training photos/0.jpg, photos/100.jpg" in said


class Text(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.words, self.tags = [], []
        self.feed(html)

    def handle_data(self, data):
        self.words.append(data)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


def test_it_says_what_the_record_holds():
    html = run_report(record())
    read = Text(html)
    said = " ".join(read.words)
    for wanted in ("41%", "3.1%", "1,234.5", "4,096", "truncated", "compression", "stage1.steps", "a device"):
        assert wanted in said, wanted
    assert "<b>.jpg" in said  # escaped in the source
    assert "<b>.jpg" not in html
    assert "the blocks with indices 0, 2" in said
    labels = [a.get("aria-label", "") for tag, a in read.tags if tag == "svg"]
    assert len(labels) == 5 + 7  # total, gradient, rate, blocks, speed; total, PP, PB, gradient, rate, both taps
    assert "3 of 400" in said
    assert "0 of 2" in said
    assert sum("block" in label or "sub-layer" in label for label in labels) == 3


@pytest.mark.parametrize(("totals", "flag"), [([3, 2, 1], ""), ([1, 2, 3], "the loss rises: it was 1"), ([1.0], "")])
def test_a_loss_that_rises_is_flagged(totals, flag):
    assert rising([{"total": total} for total in totals]) == flag


def test_it_stands_alone_and_fits_a_phone():
    html = run_report(record())
    addresses = [a.get(k, "") for _, a in Text(html).tags for k in ("src", "href")]
    assert not [a for a in addresses if a and a[0] != "#" and not a.startswith("data:")]
    assert "width=device-width" in html
    assert "<script" not in html


def test_a_run_that_trained_nothing_has_a_report():
    assert "This run trained nothing" in run_report(record(losses={}, throughput={}, skipped={}))
