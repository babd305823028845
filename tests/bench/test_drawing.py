"""Plots show what was measured, and their absence stops no measurement."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from cgspn.report.drawing import draw_sizes


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The axes of each plot that is drawn from here on."""
    import matplotlib.pyplot as plt

    found: list[Any] = []
    real = plt.subplots

    def subplots(*arguments: Any, **options: Any) -> Any:
        figure, axes = real(*arguments, **options)
        found.append(axes)
        return figure, axes

    monkeypatch.setattr(plt, "subplots", subplots)
    return found


def lines(ax: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines}


def test_encoders_are_lines_over_sizes_and_what_did_not_fit_is_left_out(tmp_path: Path, drawn: list[Any]) -> None:
    rows: list[dict[str, Any]] = [
        {"px": px, "mode": mode, "model": model, "B": 1, "images / s": rate / px}
        for mode in ("inference", "training")
        for model, rate in (("vit", 100.0), ("cgspn", 400.0))
        for px in (200, 100)  # in the order in which they were asked for
    ]
    del rows[-1]["images / s"]
    panels = [(mode, [row for row in rows if row["mode"] == mode], "images / s") for mode in ("inference", "training")]
    draw_sizes(tmp_path / "encoder.png", panels, name="model")
    ((inference, training),) = drawn[0]
    assert lines(inference) == {"vit": ([100, 200], [1.0, 0.5]), "cgspn": ([100, 200], [4.0, 2.0])}
    assert lines(training)["cgspn"] == ([200], [2.0])
    assert (inference.get_xscale(), inference.get_yscale(), training.get_title()) == ("log", "log", "training")


def test_steps_show_images_and_mfu(tmp_path: Path, drawn: list[Any]) -> None:
    rows: list[dict[str, Any]] = [{"image": px, "images/s": 1e4 / px, "MFU": 0.4} for px in (100, 200)]
    rows.append({"image": 400, "largest batch": 0})
    draw_sizes(tmp_path / "train.png", [(key, rows, key) for key in ("images/s", "MFU")], x="image")
    ((speed, mfu),) = drawn[0]
    assert [list(ax.lines[0].get_ydata()) for ax in (speed, mfu)] == [[100.0, 50.0], [0.4, 0.4]]
    assert [ax.get_ylabel() for ax in (speed, mfu)] == ["images/s", "MFU"]
    assert (tmp_path / "train.png").stat().st_size > 1000


def test_without_matplotlib_a_plot_is_missed_and_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.warns(UserWarning, match=r"train.png is not drawn: charts need matplotlib.*cgspn\[report\]"):
        draw_sizes(tmp_path / "train.png", [("", [{"image": 100, "images/s": 1.0}], "images/s")], x="image")
    assert list(tmp_path.iterdir()) == []
