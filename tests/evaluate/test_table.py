"""The summary table: averages, marks and the three forms."""

import io
import json
import re

import pytest
from rich.console import Console

from cgspn.evaluate import Metric, SummaryTable

METRICS = (
    Metric("top1", "zero-shot", scale=100, unit="%", averaged=True),
    Metric("miou", "mIoU", scale=100, unit="%", averaged=True),
    Metric("ms", "time", unit="ms", digits=2, higher_is_better=False),
    Metric("size", "parameters", unit="M", higher_is_better=None),
)


def table():
    out = SummaryTable("Teacher <and> [students]", METRICS)
    out.add("teacher", {"top1": 0.9, "miou": 0.5, "ms": 3.0, "size": 22.1})
    out.add("C-GSPN & co", {"top1": 0.88, "miou": 0.54, "ms": 1.0, "size": 14.0})
    out.add("untrained", {"top1": 0.1, "ms": 1.0})
    return out


def test_the_average_is_over_the_marked_metrics_and_needs_all_of_them():
    assert table().average("teacher") == pytest.approx(0.7)
    assert table().average("C-GSPN & co") == pytest.approx(0.71)
    assert table().average("untrained") is None


def test_rich_shows_every_number():
    console = Console(file=io.StringIO(), width=120)
    console.print(table().to_rich())
    text = console.file.getvalue()
    assert "Teacher <and> [students]" in text
    row = next(line for line in text.splitlines() if "C-GSPN & co" in line)
    assert re.findall(r"[\d.]+|–", row.split("co")[1]) == ["88.0", "54.0", "1.00", "14.0", "71.0"]
    row = next(line for line in text.splitlines() if "untrained" in line)
    assert re.findall(r"[\d.]+|–", row.split("untrained")[1]) == ["10.0", "–", "1.00", "–", "–"]


def test_html_escapes_and_marks_the_best():
    text = table().to_html()
    assert "Teacher &lt;and&gt; [students]" in text
    cells = re.findall(r"<tr><th scope=\"row\">(.*?)</th>(.*?)</tr>", text)
    assert [name for name, _ in cells] == ["teacher", "C-GSPN &amp; co", "untrained"]
    best = [re.findall(r"<strong>(.*?)</strong>", inner) for _, inner in cells]
    # Lower is better for time, where two share the mark; parameters are never marked.
    assert best == [["90.0"], ["54.0", "1.00", "71.0"], ["1.00"]]


def test_json_holds_plain_values():
    data = json.loads(table().to_json())
    assert data["rows"]["teacher"]["top1"] == 0.9
    assert data["averages"] == {"teacher": 0.7, "C-GSPN & co": pytest.approx(0.71), "untrained": None}


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="row 'x' has 'topp'; accepted: top1, miou, ms, size"):
        table().add("x", {"topp": 1.0})
    with pytest.raises(ValueError, match="row 'x' has top1 = nan"):
        table().add("x", {"top1": float("nan")})
    with pytest.raises(ValueError, match="each once"):
        SummaryTable("t", [METRICS[0], METRICS[0]])
    with pytest.raises(ValueError, match="must share scale"):
        SummaryTable("t", [METRICS[0], Metric("ms", "time", averaged=True)])
