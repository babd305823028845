"""Hub ids, without a connection."""

import builtins

import pytest

import cgspn
from cgspn.models import CheckpointError


def test_without_the_client_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CheckpointError, match=r"install cgspn\[hub\]"):
        cgspn.load_encoder("hf-hub:org/name")


def test_one_copy_of_the_weights_is_fetched_and_the_cache_serves_offline(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    teacher = cgspn.create_model("vit_mini_patch4_28", mixers=("attention",))
    teacher.save_pretrained(tmp_path)
    calls = []

    class Api:
        def model_info(self, repository, revision, timeout):
            if calls:
                raise OSError("no connection")
            names = ("model.safetensors", "pytorch_model.bin", "config.json")
            return type("Info", (), {"siblings": [type("File", (), {"rfilename": n}) for n in names]})

    def download(repository, *, revision, allow_patterns=None, local_files_only=False):
        calls.append((repository, revision, allow_patterns, local_files_only))
        if repository == "org/absent":
            raise OSError("not cached")
        return str(tmp_path)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", download)
    assert cgspn.load_encoder("hf-hub:org/name@v2").config == teacher.config
    assert calls[0][:2] == ("org/name", "v2")
    assert "model.safetensors" in calls[0][2]
    assert "pytorch_model.bin" not in calls[0][2]
    assert cgspn.load_encoder("org/name").config == teacher.config
    assert calls[1][3]
    with pytest.raises(CheckpointError, match=r"org/absent is not a file or folder here, and cannot be downloaded"):
        cgspn.load_encoder("org/absent")
