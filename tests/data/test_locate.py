"""From patterns and URLs to local files."""

import http.server
import threading
import time

import pytest
from shard_files import members, write_tar

from cgspn.data import locate as locate_module
from cgspn.data.locate import expand_braces, fetch, locate


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("a-{8..11}.tar", ["a-8.tar", "a-9.tar", "a-10.tar", "a-11.tar"]),
        ("{x,y}/{0..1}", ["x/0", "x/1", "y/0", "y/1"]),
    ],
)
def test_braces(pattern, names):
    assert expand_braces(pattern) == names


@pytest.mark.parametrize("pattern", ["{3..1}", "a{}", "{one}"])
def test_wrong_braces_are_named(pattern):
    with pytest.raises(ValueError, match=r"runs backwards|neither a range"):
        expand_braces(pattern)


class Handler(http.server.BaseHTTPRequestHandler):
    """What each path does wrong."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        server.asked.append(self.path)
        content, tries = server.content, server.asked.count(self.path)
        if "404" in self.path:
            return self.send_error(404)
        if "busy" in self.path and tries < 3:
            return self.send_error(503)
        if "chunked" in self.path:
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"fff\r\nbroken off")
            self.close_connection = True
            return None
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if "broken" in self.path or ("once" in self.path and tries == 1):
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        elif "silent" in self.path:
            self.wfile.flush()
            time.sleep(1.5)
            self.close_connection = True
        elif "slow" in self.path:
            for start in range(0, len(content), 4096):
                self.wfile.write(content[start : start + 4096])
                time.sleep(0.02)
        else:
            self.wfile.write(content)
        return None

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(locate_module, "WAIT", 0.01)
    monkeypatch.setattr(locate_module, "TIMEOUT", 0.5)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content = write_tar(tmp_path / "served.tar", members(range(5))).read_bytes()
        server.asked = []
        server.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


def test_a_url_is_fetched_once(server, tmp_path):
    for _ in range(2):
        shards = locate(server.address + "/x-{0..2}.tar?key=1", tmp_path / "cache")
        assert [s.problem for s in shards] == [""] * 3
        assert all(s.path.read_bytes() == server.content for s in shards)
    assert len(server.asked) == 3


@pytest.mark.parametrize("name", ["busy", "once", "slow"])
def test_a_server_in_trouble_is_asked_again(server, tmp_path, name):
    (shard,) = locate(f"{server.address}/{name}.tar", tmp_path / "cache")
    assert shard.problem == ""
    assert shard.path.read_bytes() == server.content


@pytest.mark.parametrize(
    ("name", "reason", "tries"),
    [
        ("404", "404", 1),
        ("broken", "ended after", 3),
        ("chunked", "", 3),
        ("silent", "timed out", 3),
    ],
)
def test_what_cannot_be_had_is_named_and_leaves_no_file(server, tmp_path, name, reason, tries):
    began = time.monotonic()
    good, bad = locate(f"{server.address}/{{good,{name}}}.tar", tmp_path / "cache")
    assert time.monotonic() - began < 10
    assert good.problem == ""
    assert bad.name == f"{server.address}/{name}.tar"
    assert "cannot be fetched" in bad.problem
    assert reason in bad.problem
    assert server.asked.count(f"/{name}.tar") == tries
    assert [p.suffix for p in (tmp_path / "cache" / "shards").iterdir() if not p.name.startswith(".")] == [".tar"]
    assert not list((tmp_path / "cache" / "shards").glob(".*tar.*[!k]"))


def test_a_server_that_is_not_there_and_a_scheme_that_nobody_knows(tmp_path, monkeypatch):
    monkeypatch.setattr(locate_module, "WAIT", 0.01)
    for url in ("http://127.0.0.1:9/x.tar", "nothing://x/y.tar"):
        (shard,) = locate(url, tmp_path)
        assert "cannot be fetched" in shard.problem


def test_many_at_once_fetch_one_file(server, tmp_path):
    threads = [threading.Thread(target=fetch, args=(server.address + "/slow.tar", tmp_path / "x")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert (tmp_path / "x").read_bytes() == server.content
    assert len(server.asked) == 1
