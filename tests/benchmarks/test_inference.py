import json

import pytest
from benchmarks.inference import InferenceConfig, crossover, run


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ((1.1, 1.2, 2.0), "faster from 100 px up"),
        ((0.9, 1.2, 2.0), "faster from 200 px up"),
        ((1.1, 0.9, 2.0), "faster from 300 px up"),
        ((1.1, 1.2, 0.9), "slower at every size up to 300 px"),
    ],
)
def test_the_crossover_is_where_it_stays(ratios, expected):
    rows = [{"pixels": 100 * (k + 1), "teacher / student": ratio} for k, ratio in enumerate(ratios)]
    assert crossover(rows[::-1]) == expected


def test_rows_say_what_was_timed(tmp_path):
    run(InferenceConfig(models=("tiny",), sizes=(28, 56), blocks=1, rounds=1), tmp_path, say=lambda _: None)
    assert (tmp_path / "inference.png").stat().st_size > 1000
    (rows,) = [value for key, value in json.loads((tmp_path / "inference.json").read_text()).items() if "tiny" in key]
    assert [row["tokens"] for row in rows] == [4, 16]
    assert all(row["teacher / student"] == pytest.approx(row["teacher ms"] / row["student ms"]) for row in rows)
