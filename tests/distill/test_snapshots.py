"""Snapshots on disk: whole, or named and not used."""

import json
import math
import os
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from cgspn.distill.manifest import entries_of, write_manifest
from cgspn.distill.snapshots import SnapshotError, Snapshots, check_snapshot
from cgspn.models.reading import CheckpointError


def test_a_process_that_is_alone_writes_and_reads_without_warnings(tmp_path):
    snapshots, weight = Snapshots(tmp_path, 1), torch.arange(3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        snapshots.save(1, {"weight": weight}, [{"loss": 2}])
        read = {"weight": torch.zeros(3)}
        assert snapshots.load(1, read) == [{"loss": 2}]
    assert torch.equal(read["weight"], weight)


class Planted:
    """What a stranger's pickle does when it is read."""

    def __reduce__(self):
        return os.mkdir, ("planted",)


def resign(folder):
    """What who can write a file can also write: a manifest that agrees."""
    steps = json.loads((folder / "manifest.json").read_text())["counts"]["steps"]
    write_manifest(folder, entries_of(folder), steps)


def flip(path, position=-1):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def signed(name, content):
    """A signed snapshot in which a file holds something else."""
    return lambda s: ((s / name).write_bytes(content), resign(s))


DATA = "0.safetensors"
HEADER = b'{"weight": {"dtype": "F32", "shape": [300], "data_offsets": [0, 1200]}}'
DAMAGE = {
    "data that is a program": signed(DATA, pickle.dumps(Planted())),
    "data of another length": signed(DATA, (1 << 36).to_bytes(8, "little") + HEADER),
    "data of less than its header": signed(DATA, len(HEADER).to_bytes(8, "little") + HEADER),
    "a link": lambda s: (s.rename(s.parent / "away"), s.symlink_to("away")),
    "record of other things": signed("record.json", b'["a", "b", "c", "d"]'),
    "record of small parts": signed("record.json", b"[" + b"[]," * 300_000 + b"1]"),
    "a bit of the data": lambda s: flip(s / DATA, 700),
    "a bit of the header": lambda s: flip(s / DATA, 20),
    "the last bit": lambda s: flip(s / DATA),
    "data cut off": lambda s: (s / DATA).write_bytes((s / DATA).read_bytes()[:-10]),
    "data empty": lambda s: (s / DATA).write_bytes(b""),
    "data longer": lambda s: (s / DATA).write_bytes((s / DATA).read_bytes() + b"x"),
    "data lost": lambda s: (s / DATA).unlink(),
    "data lost and signed": lambda s: ((s / DATA).unlink(), resign(s)),
    "data a folder": lambda s: ((s / DATA).unlink(), (s / DATA).mkdir()),
    "data a fifo": lambda s: ((s / DATA).unlink(), os.mkfifo(s / DATA)),
    "data a link": lambda s: ((s / DATA).rename(s.parent / "away"), (s / DATA).symlink_to("../away")),
    "an index planted": lambda s: (s / ".metadata").write_bytes(pickle.dumps(Planted())),
    "record lost": lambda s: (s / "record.json").unlink(),
    "record of other steps": signed("record.json", b"[{}]"),
    "record no JSON": signed("record.json", b"[" * 100000),
    "manifest lost": lambda s: (s / "manifest.json").unlink(),
    "manifest a list": lambda s: (s / "manifest.json").write_text("[]"),
    "manifest without files": lambda s: (s / "manifest.json").write_text('{"counts": {"steps": 4}, "files": {}}'),
    "manifest that leads outside": lambda s: (s / "manifest.json").write_text(
        '{"counts": {"steps": 4}, "files": {"../2": {"bytes": 1, "sha256": ""}}}'
    ),
    "a file more": lambda s: (s / "1.safetensors").write_bytes(b"x"),
    "the one of other steps": lambda s: (shutil.rmtree(s), shutil.copytree(s.with_name("00000002"), s)),
    "all empty": lambda s: (shutil.rmtree(s), s.mkdir()),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_snapshot_is_named_and_the_one_before_is_used(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    snapshots = Snapshots(tmp_path / "s", 2)
    for steps in (2, 4):
        snapshots.save(steps, {"weight": torch.full((300,), float(steps))}, [{}] * steps)
    DAMAGE[kind](tmp_path / "s" / "00000004")
    assert snapshots.newest_whole() == 2
    said = capsys.readouterr().err
    assert "the snapshot after step 4 is damaged and not used: " in said
    assert len(said.splitlines()) == 1
    read = {"weight": torch.zeros(300)}
    assert len(snapshots.load(2, read)) == 2
    assert read["weight"].eq(2).all()
    assert not Path("planted").exists()
    assert snapshots.newest_whole() == 2
    snapshots.save(4, {"weight": torch.zeros(300)}, [{}] * 4)  # which the run comes to again
    assert snapshots.newest_whole() == 4


def test_a_snapshot_that_does_not_fit_is_refused_in_one_line(tmp_path):
    snapshots = Snapshots(tmp_path, 1)
    snapshots.save(1, {"weight": torch.zeros(3)}, [{}])
    for wanted in ({"other": torch.zeros(3)}, {"weight": torch.zeros(4)}):
        with pytest.raises(SnapshotError, match="cannot be used"):
            snapshots.load(1, wanted)


@pytest.mark.parametrize("kind", ["program", "not finite"])
def test_a_snapshot_that_was_planted_is_refused_where_it_is_loaded_at_once(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    snapshots = Snapshots(tmp_path / "s", 1)
    snapshots.save(1, {"weight": torch.zeros(3)}, [{}])
    content = pickle.dumps(Planted()) if kind == "program" else save({"weight": torch.tensor([0, math.nan, 0])})
    (tmp_path / "s/00000001" / DATA).write_bytes(content)
    with pytest.raises(SnapshotError) as caught:
        snapshots.load(1, {"weight": torch.zeros(3)})
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError):
        check_snapshot(tmp_path / "s/00000001", 1)
    assert not Path("planted").exists()


def test_a_full_disk_is_said_to_be_full(tmp_path, monkeypatch):
    snapshots = Snapshots(tmp_path, 1)
    snapshots.save(1, {"weight": torch.zeros(3)}, [{}])

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cgspn.distill.snapshots.save_file", full)
    with pytest.raises(SnapshotError, match=r"disk full: .*the run can resume from the one after step 1"):
        snapshots.save(2, {"weight": torch.zeros(3)}, [{}] * 2)
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]
