"""Compiled kernels on disk: whole, or made again."""

from cgspn.ops.cuda import compile as compile_module
from cgspn.ops.cuda.compile import cubin


def test_a_kernel_that_was_changed_on_disk_is_made_again(tmp_path, monkeypatch):
    made = []

    def compile_cubin(name, defines, arch):
        made.append(name)
        return b"code of " + name.encode() * 100, ""

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compile_module, "compile_cubin", compile_cubin)
    monkeypatch.setattr(compile_module, "source", lambda name: "source")
    monkeypatch.setattr(compile_module, "compiler_version", lambda: "13.0")
    wanted = cubin("scan", (), "sm_90")
    assert cubin("scan", (), "sm_90") == wanted
    assert len(made) == 1
    (kept,) = (tmp_path / "cgspn/kernels").iterdir()
    content = kept.read_bytes()
    for damaged in (b"", content[:-1], content[:40], content[32:], content[:50] + b"\0" + content[51:], content + b"x"):
        kept.write_bytes(damaged)
        before = len(made)
        assert cubin("scan", (), "sm_90") == wanted
        assert len(made) == before + 1
        assert kept.read_bytes() == content
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
