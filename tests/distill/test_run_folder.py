"""One run in a folder, and stages that are whole."""

import json
import multiprocessing
from pathlib import Path

import pytest
import torch

import cgspn
from cgspn.distill.parallel import World
from cgspn.distill.resume import StageFolders, carried_from
from cgspn.distill.run_folder import locked


def take(folder, barrier, results):
    barrier.wait()
    try:
        with locked(Path(folder), World()):
            results.put("held")
            barrier.wait()  # as long as the others try
    except ValueError as error:
        results.put(str(error))
        barrier.wait()


def test_of_many_at_once_one_holds_the_folder_and_the_others_are_told_who(tmp_path):
    context = multiprocessing.get_context("fork")
    for _ in range(5):
        barrier, results = context.Barrier(3), context.Queue()
        processes = [context.Process(target=take, args=(tmp_path, barrier, results)) for _ in range(3)]
        for process in processes:
            process.start()
        said = sorted(results.get(timeout=20) for _ in processes)
        for process in processes:
            process.join(20)
        assert said[0] == "held"
        assert all("which another run is using: " in each for each in said[1:])
        assert not list(tmp_path.iterdir())


def test_a_lock_that_a_killed_run_left_is_no_lock(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".holder.json").write_text('{"process": 1}')
    with locked(tmp_path, World()):
        with pytest.raises(ValueError, match=r"another run is using: process \d+ on "), locked(tmp_path, World()):
            pass
        assert (tmp_path / ".lock").exists()
    assert not list(tmp_path.iterdir())


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").symlink_to("../precious")
    with locked(tmp_path / "run", World()):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("kind", ["losses", "weights", "lost", "count", "manifest"])
def test_a_damaged_stage_is_named_and_run_again(tmp_path, capsys, kind):
    stage, student = tmp_path / "stages/0", cgspn.create_model("cgspn_mini_patch4_28")
    folders = StageFolders(tmp_path, 0, World())
    folders.finish(0, student, [{"total": 1.0}], {"rate": 2.0}, {"scales": torch.ones(2)})
    losses, throughput, carried = folders.restore(0, student)
    assert (losses, throughput, carried["scales"].tolist()) == ([{"total": 1.0}], {"rate": 2.0}, [1, 1])
    if kind == "manifest":
        (stage / "manifest.json").unlink()
    elif kind == "lost":
        (stage / "model.safetensors").unlink()
    elif kind == "count":
        manifest = json.loads((stage / "manifest.json").read_text())
        (stage / "manifest.json").write_text(json.dumps(manifest | {"counts": {"steps": 5}}))
    else:
        (stage / ("losses.json" if kind == "losses" else "model.safetensors")).write_bytes(b"changed")
    assert folders.restore(0, student) is None
    assert "stage 1 is damaged and run again: " in capsys.readouterr().err
    assert [path.name for path in stage.parent.iterdir()] == ["0.damaged"]
    assert carried_from(tmp_path) == {}  # not those of the damaged stage
    for number in (2, 10):
        folders.finish(number, student, [{"total": 1.0}], {}, {"scales": torch.tensor(float(number))})
    assert carried_from(tmp_path)["scales"] == 10
