"""Event files: what TensorBoard reads back, and what is said where there is none."""

import sys

import pytest

from cgspn.distill.events import EventWatch, group_of


def test_curves_are_read_back_and_a_repeated_step_replaces_the_old_one(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for steps, shift in ((range(4), 0.0), (range(2, 5), 10.0)):  # the second attempt goes on after step 2
        watch = EventWatch(tmp_path, "student, stage 2")
        for step in steps:
            watch({"step": step, "total": step + shift, "PB block 3": 0.5, "mfu": 0.4, "images_per_second": 9.0})
        watch.close()
    events = accumulator.EventAccumulator(str(tmp_path / "student_stage_2")).Reload()
    found = {e.step: e.value for e in events.Scalars("loss/total")}
    assert found == {0: 0, 1: 1, 2: 12, 3: 13, 4: 14}
    assert set(events.Tags()["scalars"]) == {"loss/total", "PB of blocks/03", "speed/mfu", "speed/images_per_second"}


def test_names_have_a_place():
    assert group_of("block 3") == "sub-layer of blocks/03"
    assert group_of("lr") == "optimisation/lr"


def test_a_missing_library_is_named_with_its_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'cgspn\[watch\]'"):
        EventWatch(tmp_path, "stage")
