"""From patterns and URLs to local files."""

import contextlib
import http.server
import os
import signal
import threading
import time
from functools import partial

import pytest
from shard_files import members, write_tar

from cgspn.data import fetch as fetch_module
from cgspn.data import open_samples
from cgspn.data.fetch import fetch, fetch_all
from cgspn.data.labelled import open_captioned
from cgspn.data.locate import expand_braces, locate


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


def test_a_slip_in_a_pattern_is_refused_before_names_are_made():
    for pattern in ("{0..99999999}", "{0..999}{0..999}", "{0..9" + "9" * 4000 + "}"):
        with pytest.raises(ValueError, match=r"accepted: at most 300000|limit"):
            expand_braces(pattern)


@pytest.mark.parametrize("name", ["run [1]", "run {a,b}", "x*y", "{0..3}"])
def test_what_is_there_as_it_is_written_is_no_pattern(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    for number in range(2):
        write_tar(folder / f"{number}.tar", members([number]))
    for source in (folder / "1.tar", folder / "{1..1}.tar", folder / "[1].tar"):
        assert [shard.path for shard in locate(str(source), tmp_path)] == [folder / "1.tar"]
    assert len(open_samples(str(folder), cache=tmp_path / "cache")) == 2


def test_a_pattern_may_be_longer_than_the_name_of_a_file(tmp_path, monkeypatch):
    write_tar(tmp_path / "000.tar", members([0]))
    write_tar(tmp_path / "007.tar", members([1]))
    names = ",".join(["000"] * 100 + ["007"])
    assert len(open_samples(f"{tmp_path}/{{{names}}}.tar", cache=tmp_path / "cache")) == 101
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert len(open_captioned(f"{tmp_path}/{{{names}}}.tar").pictures) == 101


def test_patterns_find_files_alone_and_do_not_follow_links_to_folders(tmp_path):
    (tmp_path / "a" / "dir.tar").mkdir(parents=True)
    os.mkfifo(tmp_path / "a" / "fifo.tar")
    write_tar(tmp_path / "a" / "0.tar", members([1]))
    (tmp_path / "a" / "up").symlink_to("..")
    assert [shard.path for shard in locate(f"{tmp_path}/**/*.tar", tmp_path)] == [tmp_path / "a" / "0.tar"]
    (shard,) = locate(f"{tmp_path}/a/fifo.tar", tmp_path)
    assert shard.problem == "no file"


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
        if "heads" in self.path:  # each byte in time, and never a last one
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
            return self.drip()
        self.send_response(206 if "part" in self.path else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if "broken" in self.path or ("once" in self.path and tries == 1):
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        elif "silent" in self.path:
            self.wfile.flush()
            time.sleep(1.5)
            self.close_connection = True
        elif "drip" in self.path:
            self.drip()
        elif "slow" in self.path:
            for start in range(0, len(content), 4096):
                self.wfile.write(content[start : start + 4096])
                time.sleep(0.02)
        else:
            self.wfile.write(content)
        return None

    def drip(self):
        with contextlib.suppress(OSError):
            for _ in range(600):  # half a minute
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.05)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_module, "WAIT", 0.01)
    monkeypatch.setattr(fetch_module, "TIMEOUT", 0.2)
    monkeypatch.setattr(fetch_module, "WINDOW", 0.4)
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
        ("silent", "timed out", 2),
        ("drip", "less than 1024 bytes a second", 1),
        ("heads", "less than 1024 bytes a second", 1),
        ("part", "answers 206, not with a whole file", 3),
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
    assert not list((tmp_path / "cache" / "shards").glob("*.part"))


def test_a_server_that_is_not_there_and_a_scheme_that_nobody_knows(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_module, "WAIT", 0.01)
    for url in ("http://127.0.0.1:9/x.tar", "http://[", "nothing://x/y.tar"):
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


def test_an_interruption_ends_downloads_at_once(server, tmp_path, request):
    # a shell's background jobs ignore the signal
    request.addfinalizer(
        partial(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.default_int_handler))
    )
    urls = [f"{server.address}/drip-{number}.tar" for number in range(3)]
    began = time.monotonic()
    found = fetch_all(urls, tmp_path, 3)
    threading.Timer(0.2, signal.raise_signal, (signal.SIGINT,)).start()
    with pytest.raises(KeyboardInterrupt):
        list(found)
    assert time.monotonic() - began < 15  # on a busy machine; the files would take twice as long


def test_once_too_many_have_failed_the_others_are_not_tried(server, tmp_path):
    problems = [problem for _, problem in fetch_all([f"{server.address}/404-{n}.tar" for n in range(100)], tmp_path, 5)]
    assert all(problems)
    assert "not tried" in problems[-1]
    assert len(server.asked) < 30
