"""Configs and weights that hold anything: refused in a line that names file, key, found and accepted."""

import json
import os
import pickle
import struct
import zipfile

import pytest
import safetensors.torch as st
import torch

import cgspn
from cgspn.models import CheckpointError
from cgspn.models.reading import read_json
from cgspn.models.weights import open_safetensors
from cgspn.teachers.files import open_weights


@pytest.fixture
def folder(tmp_path):
    cgspn.create_model("cgspn_mini_patch4_28").save_pretrained(tmp_path)
    return tmp_path


def change(folder, path, value):
    config = json.loads((folder / "config.json").read_text())
    at = config
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("encoder",), None, "encoder is None; accepted: an object with name, image_size"),
        (("encoder", "image_mean"), None, "encoder.image_mean is None; accepted: a list"),
        (("encoder", "patch_size"), "4", "encoder.patch_size is '4'; accepted: a whole number"),
        (("encoder", "patch_size"), 4.5, "encoder.patch_size is 4.5; accepted: a whole number"),
        (("encoder", "mlp_hidden"), True, "encoder.mlp_hidden is True; accepted: a whole number"),
        (("encoder", "width"), -1, "width is -1; accepted: 1 to 65536"),
        (("encoder", "width"), 10**400, "...; accepted: a whole number"),
        (("encoder", "image_mean"), [0.5], "image_mean is (0.5,); accepted: a number for each of 3 channels"),
        (("encoder", "trained_sizes"), [0, 28], "trained_sizes is (0, 28); accepted: 1 to 65536 pixels"),
        (("encoder", "window"), [8, 10**9], "window is (8, 1000000000); accepted: 1 to 65536"),
        (("encoder", "\ud800"), 1, "EncoderConfig has no \\ud800"),
        (("encoder", "width"), 30000, "do not fit"),
        (("encoder", "norm_eps"), float("nan"), "encoder.norm_eps is nan; accepted: a finite number"),
        (("encoder", "attention"), [], "encoder.attention is []; accepted: an object with heads"),
        (("encoder", "mixers"), ["attention"] * 5000, "mixers has 5000 entries; accepted: at most 4096"),
        (("encoder", "mixers"), ["attention"] * 4000, "4000 blocks"),
        (("encoder", "pooling"), "other", "encoder.pooling is 'other'; accepted: 'map', 'mean', 'cls'"),
        (("encoder", "image_size"), [28, 28, 28], "encoder.image_size is [28, 28, 28]; accepted: a list of 2"),
        (("encoder", "propagation", "compression"), 1e-9, "compression is 1e-09"),
        (("encoder", "other"), 1, "EncoderConfig has no other"),
        (("model",), [], "holds a [] model"),
    ],
)
def test_values_that_no_config_can_have(folder, path, value, said):
    change(folder, path, value)
    with pytest.raises(CheckpointError) as caught:
        cgspn.load_encoder(folder)
    assert said in str(caught.value)
    assert str(folder) in str(caught.value)


TWICE, SMALL = b'{"model": "encoder", "model": "dual"}', b'{"model": [' + b"[]," * 300_000 + b"1]}"


@pytest.mark.parametrize(
    "content", [b"[" * 100000, b"\xff\xfe{}", b"[]", b"", b'{"a":' * 2000, b"9" * 5000, TWICE, SMALL]
)
def test_files_that_are_no_config(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        cgspn.load_encoder(folder)


def test_json_that_is_too_large_or_no_file(tmp_path):
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(1 << 40)  # a hole
    os.mkfifo(tmp_path / "fifo.json")
    with pytest.raises(CheckpointError, match="accepted: 16777216"):
        read_json(tmp_path / "large.json")
    with pytest.raises(CheckpointError, match="is not a file"):
        read_json(tmp_path / "fifo.json")


def test_weights_that_are_not_finite(folder):
    weights = st.load_file(folder / "model.safetensors")
    name = "blocks.0.mlp.fc1.weight"
    for value in (float("nan"), float("inf")):
        weights[name][3, 4] = value
        st.save_file(weights, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"{name} holds values that are not finite"):
            cgspn.load_encoder(folder)


def test_weights_of_another_kind_or_beyond_the_dtype(folder):
    weights = st.load_file(folder / "model.safetensors")
    for value, said in (
        (torch.ones(96).long(), "is of torch.int64"),
        (torch.full((96,), 1e300, dtype=torch.float64), "float32"),
    ):
        st.save_file(weights | {"norm.weight": value}, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"norm.weight .*{said}"):
            cgspn.load_encoder(folder)
    st.save_file(weights | {"norm.weight": torch.full((96,), 1e30)}, folder / "model.safetensors")
    assert cgspn.load_encoder(folder).norm.weight[0] == 1e30
    with pytest.raises(CheckpointError, match=r"norm.weight in torch.float16 holds values that are not finite"):
        cgspn.load_encoder(folder, dtype=torch.float16)


def rewritten(path, edit):
    """The file with another header before the same bytes."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


@pytest.mark.parametrize(
    "edit",
    [
        lambda h: h["a"].update(data_offsets=h["b"]["data_offsets"]),
        lambda h: h["a"].update(dtype="F64"),
        lambda h: h["a"].update(shape=[8]),
        lambda h: h["a"].update(shape=[2]),
        lambda h: h["b"].update(shape=[10**10]),
        lambda h: h["b"].update(shape=[2**63, 4]),
        lambda h: h["a"].update(data_offsets=[-16, 16]),
        lambda h: h["a"].update(data_offsets=[0]),
        lambda h: h["a"].update(shape=[4.0]),
        lambda h: h.pop("b"),
        lambda h: h.update(a=[]),
    ],
)
def test_headers_that_the_library_refuses(tmp_path, edit):
    path = tmp_path / "w.safetensors"
    st.save_file({"a": torch.ones(4), "b": torch.ones(4)}, path)
    assert open_safetensors(path)[0]["a"].shape == (4,)
    rewritten(path, edit)
    with pytest.raises(CheckpointError, match="truncated, damaged or not a safetensors file"):
        open_safetensors(path)


def test_an_index_names_files_of_its_own_folder_alone(tmp_path):
    (tmp_path / "m").mkdir()
    for where in (tmp_path, tmp_path / "m"):
        st.save_file({"a": torch.ones(4)}, where / "x.safetensors")
    (tmp_path / "m" / "link.safetensors").symlink_to(tmp_path / "x.safetensors")
    (tmp_path / "m" / "loop.safetensors").symlink_to("loop.safetensors")
    os.mkfifo(tmp_path / "m" / "fifo.safetensors")
    index = tmp_path / "m" / "model.safetensors.index.json"
    names = ("../x.safetensors", str(tmp_path / "x.safetensors"), "link.safetensors", "loop.safetensors")
    for name in (*names, "fifo.safetensors", index.name, "", ".", "a\0b", "/dev/zero"):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(CheckpointError, match="names"):
            open_weights(index)
    for value in ({"b": "x.safetensors"}, {}, {"a": "x.safetensors", "b": "x.safetensors"}, [], {"a": 1}):
        index.write_text(json.dumps({"weight_map": value}))
        with pytest.raises(CheckpointError, match=r"agree|weight_map|no tensors"):
            open_weights(index)
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    assert list(open_weights(index)[0]) == ["a"]
    # the hub's cache links each file to a folder of blobs
    (tmp_path / "snapshot").mkdir()
    for name in ("x.safetensors", index.name):
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "m" / name)
    assert list(open_weights(tmp_path / "snapshot" / index.name)[0]) == ["a"]


class Planted:
    def __reduce__(self):
        return os.mkdir, ("planted",)


def twice(depth):
    """Dictionaries of which each has the one before twice: 2^depth names in some hundred bytes."""
    found = {"a": torch.zeros(1)}
    for _ in range(depth):
        found = {"a": found, "b": found}
    return found


@pytest.mark.filterwarnings("ignore")  # of PyTorch, about what the test makes
def test_pickles_that_run_or_expand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, one_and_more = torch.zeros(1), torch.zeros(10**5)
    torch.save({"a": one.expand(10**10)}, "stride.pt")
    torch.save({"a": torch.sparse_coo_tensor([[0]], [1.0], (10**12,))}, "sparse.pt")
    torch.save({"a": torch.empty(10**12, device="meta")}, "meta.pt")
    torch.save({"a": one, "b": Planted()}, "planted.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps({"a": Planted()}))
    torch.save({"a": torch.zeros(10**6)}, "good.pt")
    with zipfile.ZipFile("good.pt") as stored, zipfile.ZipFile("deflated.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    torch.save({str(number): one_and_more for number in range(50)}, "shared.pt")
    torch.save(twice(40), "twice.pt")
    torch.save({"a": torch.zeros(2, dtype=torch.complex64)}, "complex.pt")
    torch.save({"a": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])}, "nested.pt")
    take = b"\x80\2cbuiltins\nbytearray\n\x8a\6\0\0\0\0\x10\0\x85R."  # 64 GiB
    with zipfile.ZipFile("take.pt", "w") as stored:
        stored.writestr("a/data.pkl", take)
        stored.writestr("a/version", "3")
    torch.save({"a": one}, "old.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "old.pt").read_bytes()
    (tmp_path / "old.pt").write_bytes(content.replace(b"\x80\2}q\0X\1\0\0\0a", take + b"}q\0X\1\0\0\0a", 1))
    disks = bytearray((tmp_path / "good.pt").read_bytes())
    disks[disks.rindex(b"PK\6\7") + 16] = 9  # of how many disks the file is
    (tmp_path / "disks.pt").write_bytes(disks)
    os.mkfifo("fifo.pt")
    (tmp_path / "zero.pt").symlink_to("/dev/zero")
    (tmp_path / "empty.pt").touch()
    bad = ("stride", "sparse", "meta", "planted", "raw", "deflated", "shared", "twice", "complex", "nested", "take")
    for name in (*bad, "old", "disks", "fifo", "zero", "empty"):
        with pytest.raises(CheckpointError) as caught:
            open_weights(tmp_path / f"{name}.pt")
        assert "will likely succeed" not in str(caught.value)  # PyTorch's advice to read it without limits
    assert not (tmp_path / "planted").exists()
    assert open_weights(tmp_path / "good.pt")[0]["a"].read().shape == (10**6,)
