"""Snapshots on disk: whole, or named and not used."""

import json
import os
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

from cgspn.distill.manifest import DamageError, entries_of, write_manifest
from cgspn.distill.snapshots import SnapshotError, Snapshots, check_snapshot


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
    steps = json.loads((folder / "manifest.json").read_text())["counts"]
    write_manifest(folder, entries_of(folder) | entries_of(folder, ".*"), steps)


def flip(path, position=-1):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def edit(folder, change):
    """A signed index that claims something else."""
    index = pickle.loads((folder / ".metadata").read_bytes())
    for tensor, place in zip(index.state_dict_metadata.values(), index.storage_data.values(), strict=True):
        change(tensor, place)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    resign(folder)


def planted_index(content):
    return lambda s: ((s / ".metadata").write_bytes(content), resign(s))


DATA = "__0_0.distcp"
DAMAGE = {
    "index of bytes that are not there": planted_index(b"\x80\5\x96" + (1 << 36).to_bytes(8, "little") + b"."),
    "index of marks": planted_index(b"\x80\2" + b"(" * 100_000 + b"."),
    "index of another folder": lambda s: edit(s, lambda t, place: setattr(place, "relative_path", "..")),
    "index beyond the data": lambda s: edit(s, lambda t, place: setattr(place, "offset", 10**12)),
    "index of less": lambda s: edit(s, lambda t, place: t.chunks.clear()),
    "index of more": lambda s: edit(s, lambda t, place: t.chunks.extend(t.chunks * 10**5)),
    "a link": lambda s: (s.rename(s.parent / "away"), s.symlink_to("away")),
    "record of other things": lambda s: ((s / "record.json").write_text('["a", "b", "c", "d"]'), resign(s)),
    "record of small parts": lambda s: ((s / "record.json").write_text("[" + "[]," * 300_000 + "1]"), resign(s)),
    "a bit of the data": lambda s: flip(s / DATA, 700),
    "the last bit": lambda s: flip(s / DATA),
    "data cut off": lambda s: (s / DATA).write_bytes((s / DATA).read_bytes()[:-10]),
    "data empty": lambda s: (s / DATA).write_bytes(b""),
    "data longer": lambda s: (s / DATA).write_bytes((s / DATA).read_bytes() + b"x"),
    "data lost": lambda s: (s / DATA).unlink(),
    "data a folder": lambda s: ((s / DATA).unlink(), (s / DATA).mkdir()),
    "data a fifo": lambda s: ((s / DATA).unlink(), os.mkfifo(s / DATA)),
    "data a link": lambda s: ((s / DATA).rename(s.parent / "away"), (s / DATA).symlink_to("../away")),
    "index lost": lambda s: (s / ".metadata").unlink(),
    "index flipped": lambda s: flip(s / ".metadata", 50),
    "index planted": lambda s: (s / ".metadata").write_bytes(pickle.dumps(Planted())),
    "index planted and signed": lambda s: ((s / ".metadata").write_bytes(pickle.dumps(Planted())), resign(s)),
    "index of nothing": lambda s: ((s / ".metadata").write_bytes(pickle.dumps({})), resign(s)),
    "record lost": lambda s: (s / "record.json").unlink(),
    "record of other steps": lambda s: ((s / "record.json").write_text("[{}]"), resign(s)),
    "record no JSON": lambda s: ((s / "record.json").write_text("[" * 100000), resign(s)),
    "manifest lost": lambda s: (s / "manifest.json").unlink(),
    "manifest a list": lambda s: (s / "manifest.json").write_text("[]"),
    "manifest without files": lambda s: (s / "manifest.json").write_text('{"counts": {"steps": 4}, "files": {}}'),
    "manifest that leads outside": lambda s: (s / "manifest.json").write_text(
        '{"counts": {"steps": 4}, "files": {"../2": {"bytes": 1, "sha256": ""}}}'
    ),
    "a file more": lambda s: (s / "__1_0.distcp").write_bytes(b"x"),
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


def test_a_snapshot_that_was_planted_runs_nothing_where_it_is_loaded_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snapshots = Snapshots(tmp_path / "s", 1)
    snapshots.save(1, {"weight": torch.zeros(3)}, [{}])
    (tmp_path / "s/00000001/.metadata").write_bytes(pickle.dumps(Planted()))
    with pytest.raises(SnapshotError, match=r"posix\.mkdir"):
        snapshots.load(1, {"weight": torch.zeros(3)})
    with pytest.raises(DamageError):
        check_snapshot(tmp_path / "s/00000001", 1)
    assert not Path("planted").exists()


@pytest.mark.parametrize("kind", ["program", "deflated", "allocating", "old"])
def test_a_tensor_that_was_planted_is_refused_before_it_runs_or_expands(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    snapshots = Snapshots(tmp_path / "s", 1)
    snapshots.save(1, {"weight": torch.zeros(3)}, [{}])
    how = zipfile.ZIP_DEFLATED if kind == "deflated" else zipfile.ZIP_STORED
    take = b"\x80\2cbuiltins\nbytearray\n\x8a\6\0\0\0\0\x10\0\x85R."  # 64 GiB
    path = tmp_path / "s/00000001" / DATA
    if kind == "old":
        path.write_bytes(take)
    else:
        with zipfile.ZipFile(path, "w", how) as archive:
            archive.writestr("a/data.pkl", take if kind == "allocating" else pickle.dumps(Planted(), 2))
            archive.writestr("a/version", "3")
    edit(path.parent, lambda t, place: (setattr(place, "offset", 0), setattr(place, "length", path.stat().st_size)))
    assert snapshots.newest_whole() == 1
    with pytest.raises(SnapshotError) as caught:
        snapshots.load(1, {"weight": torch.zeros(3)})
    assert "\n" not in str(caught.value)
    assert "will likely succeed" not in str(caught.value)
    assert not Path("planted").exists()


def test_a_full_disk_is_said_to_be_full(tmp_path, monkeypatch):
    snapshots = Snapshots(tmp_path, 1)
    snapshots.save(1, {"weight": torch.zeros(3)}, [{}])

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cgspn.distill.snapshots.save", full)
    with pytest.raises(SnapshotError, match=r"disk full: .*the run can resume from the one after step 1"):
        snapshots.save(2, {"weight": torch.zeros(3)}, [{}] * 2)
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]
