"""The report as a file that is passed on: it holds everything it shows, for each of its readers."""

import re
from html.parser import HTMLParser

import pytest
import torch

from cgspn.data import load_embedded
from cgspn.distill import DistillConfig, OptimConfig, distill
from cgspn.evaluate.suite import METRICS
from cgspn.evaluate.table import Metric, SummaryTable
from cgspn.report.demo import DemoResult, demo_report
from cgspn.teachers import convert, load_embedded_teacher

VOID = {"img", "meta", "br", "hr", "link", "input", "path", "use", "circle", "rect", "line", "polyline"}


class Page(HTMLParser):
    """Collects tags and checks that they close in order."""

    def __init__(self):
        super().__init__()
        self.open, self.tags = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def html():
    torch.manual_seed(0)
    teacher = load_embedded_teacher()
    images = load_embedded("test").subset(torch.arange(200))
    student = convert(teacher.image, compression=4)
    one = OptimConfig(steps=2, batch_size=8)
    histories = distill(teacher, student, images, DistillConfig(stage1=one, stage2=one))
    models = {"teacher": teacher, "C-GSPN": teacher.with_image(student).eval()}
    table = SummaryTable("Demo", [*METRICS, Metric("ms_224", "224 px", 1, "ms", 1, False)])
    for name, ms in zip(models, (30.0, 10.0)):
        table.add(name, {m.key: 0.5 for m in METRICS} | {"ms_224": ms})
    return demo_report(DemoResult(table, {"C-GSPN": histories}, models, images, {"seed": "<0>"}))


def test_it_is_one_whole_document_that_asks_nothing_of_the_network(html):
    page = Page()
    page.feed(html)
    assert not page.open
    for tag, attributes in page.tags:
        for key in ("src", "href", "data", "action"):
            target = attributes.get(key) or ""
            assert target.startswith(("data:", "#")) or not target, (tag, key, target[:80])
    assert not re.search(r"url\((?!['\"]?(#|data:))|@import|<script[^>]+src", html)
    assert len(html) < 10_000_000


def test_it_can_be_read_on_a_phone_in_the_dark_and_aloud(html):
    page = Page()
    page.feed(html)
    assert any(t == "meta" and a.get("name") == "viewport" for t, a in page.tags)
    assert "prefers-color-scheme: dark" in html
    pictures = [a for t, a in page.tags if t == "img" and a.get("src")]  # others are filled in under a label
    assert len(pictures) >= 6
    assert all(a.get("alt") for a in pictures)
    assert all(a.get("aria-label") or a.get("role") == "presentation" for t, a in page.tags if t == "svg")


def test_it_shows_every_section_and_escapes_what_it_is_given(html):
    for word in ("influence", "patches", "stage 1", "stage 2", "teacher", "C-GSPN"):
        assert word.lower() in html.lower()
    assert "&lt;0&gt;" in html
    assert "<0>" not in html


def test_a_card_says_how_much_faster_as_the_table_does(html):
    assert "the teacher takes 30.0 ms: 3.0 times as long" in html
    assert html.count("<strong>10.0</strong>") == 1
    assert "<strong>0.5" not in html.partition("<table>")[2].partition("</table>")[0]  # no best where all are the same


def test_a_result_without_a_student_is_refused():
    images = load_embedded("test").subset(torch.arange(16))
    with pytest.raises(ValueError, match="models lacks 'teacher'"):
        demo_report(DemoResult(SummaryTable("Demo", METRICS), {}, {}, images, {}))
