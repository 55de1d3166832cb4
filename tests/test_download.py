"""Fetching files, from a server on this machine that can misbehave in every way a real one does."""

import contextlib
import hashlib
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from s4s_core.models import download
from s4s_core.models.download import fetch, file_sha256, home

CONTENT = bytes(range(256)) * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("S4S_HOME", str(tmp_path / "home"))
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    return tmp_path / "home"


class Server(ThreadingHTTPServer):
    """Serves `content` at /model.bin, as its attributes say; keeps the Range of every request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.etag, self.ranges = CONTENT, '"one"', True
        self.drop_after = self.gate = self.stall = None
        self.ignores_if_range, self.says_its_length = False, True
        self.moved_to, self.status, self.chunked = "/model.bin", None, False
        self.asked = []
        self.url = f"http://127.0.0.1:{self.server_port}/model.bin"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        if self.path == "/moved.bin":
            self.send_response(302)
            self.send_header("Location", server.moved_to)
            return self.end_headers()
        server.asked.append(asked)
        if self.path != "/model.bin":
            return self.send_error(404)
        if server.gate:
            server.gate.wait(10)
        unchanged = server.ignores_if_range or self.headers.get("If-Range") == server.etag
        start = 0
        if asked and server.ranges and unchanged:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(server.content):
                return self.send_error(416)
        body = server.content[start:]
        self.send_response(server.status or (206 if start else 200))
        if start:
            end = len(server.content)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{end}")
        if server.chunked:
            self.protocol_version = "HTTP/1.1"
            self.send_header("Transfer-Encoding", "chunked")
            ending = b"\r\n0\r\n\r\n"
            body = f"{len(body):x}\r\n".encode() + body + ending
        elif server.says_its_length:
            self.send_header("Content-Length", str(len(body)))
        if server.etag:
            self.send_header("ETag", server.etag)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the client may have had enough
            self.wfile.write(body[: server.drop_after])
            if server.stall:
                server.stall.wait(30)


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def visible(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


@pytest.mark.parametrize("sha256", [SHA256, ""])
def test_a_file_is_fetched_once(server, folder, sha256):
    path = fetch(server.url, sha256)
    assert path == folder / "model.bin" and path.read_bytes() == CONTENT
    assert fetch(server.url, sha256) == path and server.asked == [None]
    assert visible(folder) == ["model.bin"] and file_sha256(path) == SHA256


def test_a_file_put_there_by_hand_needs_no_network(folder):
    folder.mkdir()
    (folder / "model.bin").write_bytes(CONTENT)
    assert fetch("https://nowhere.invalid/model.bin?download=true", SHA256).read_bytes() == CONTENT


def test_a_name_of_its_own(server, folder):
    assert fetch(server.url, name="cifar10.bin") == folder / "cifar10.bin"


def test_redirects_are_followed(server, folder):
    path = fetch(server.url.replace("model", "moved"), SHA256)
    assert path == folder / "moved.bin" and path.read_bytes() == CONTENT


@pytest.fixture
def broken_off(server, folder, one_sentence):
    """A download of which 100,000 bytes came before the connection closed."""
    server.drop_after = 100_000
    with one_sentence("100000 of 256000 bytes", server.url, SHA256, str(folder / "model.bin")):
        fetch(server.url, SHA256)
    assert visible(folder) == []
    server.drop_after, server.asked = None, []
    return server


@pytest.mark.parametrize("sha256", [SHA256, ""])
def test_what_has_come_is_continued(broken_off, sha256):
    assert fetch(broken_off.url, sha256).read_bytes() == CONTENT
    assert broken_off.asked == [f"bytes={100_000 - download.OVERLAP}-"]


@pytest.mark.slow
def test_a_killed_download_is_continued(server, folder):
    server.drop_after, server.stall = 100_000, threading.Event()
    code = "import sys; from s4s_core.models.download import fetch; fetch(*sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", code, server.url, SHA256])
    limit = time.monotonic() + 60
    while sum(p.stat().st_size for p in folder.glob(".*")) < 100_000:
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.05)
    process.kill()
    process.wait()
    server.stall.set()
    assert visible(folder) == []
    server.drop_after = server.stall = None
    assert fetch(server.url, SHA256).read_bytes() == CONTENT
    assert server.asked[-1] == f"bytes={100_000 - download.OVERLAP}-"
    assert visible(folder) == ["model.bin"]


def test_a_download_may_break_off_many_times(server):
    server.drop_after = 100_000
    for _ in range(5):
        with pytest.raises(download.UsageError):
            fetch(server.url, SHA256)
    assert fetch(server.url, SHA256).read_bytes() == CONTENT
    more = 100_000 - download.OVERLAP
    assert server.asked == [None] + [f"bytes={more * k}-" for k in range(1, 6)]


def test_a_complete_part_is_finished_without_asking_past_its_end(broken_off, folder):
    (folder / ".model.bin.part").write_bytes(CONTENT)
    assert fetch(broken_off.url, SHA256).read_bytes() == CONTENT
    assert broken_off.asked == [f"bytes={256_000 - download.OVERLAP}-"]


def test_a_server_without_ranges_starts_anew(broken_off):
    broken_off.ranges = False
    assert fetch(broken_off.url, SHA256).read_bytes() == CONTENT


@pytest.mark.parametrize("ignores_if_range", [False, True])
@pytest.mark.parametrize("size", [50_000, 256_000, 300_000])
def test_a_changed_file_starts_anew(broken_off, ignores_if_range, size):
    broken_off.content, broken_off.etag = b"\7" * size, '"two"'
    broken_off.ignores_if_range = ignores_if_range
    assert fetch(broken_off.url).read_bytes() == broken_off.content


def test_a_server_that_names_no_version_starts_anew(server):
    server.etag, server.drop_after = "", 100_000
    with pytest.raises(download.UsageError):
        fetch(server.url)
    server.drop_after, server.content = None, CONTENT[::-1]
    assert fetch(server.url).read_bytes() == CONTENT[::-1] and server.asked == [None, None]


def test_a_server_that_names_no_length_is_believed(server):
    server.says_its_length = False
    assert fetch(server.url, SHA256).read_bytes() == CONTENT


def test_without_a_length_and_a_hash_nothing_tells_whether_it_is_whole(server, one_sentence):
    server.says_its_length, server.drop_after = False, 100_000
    with one_sentence(server.url, "does not say how long"):
        fetch(server.url)


@pytest.mark.parametrize("cut", [None, 100_000])
def test_chunks_tell_whether_a_file_is_whole(server, one_sentence, cut):
    server.chunked, server.drop_after = True, cut
    if cut is None:
        assert fetch(server.url).read_bytes() == CONTENT
        return
    with one_sentence(server.url, "IncompleteRead"):
        fetch(server.url)


@pytest.mark.parametrize("sha256", [SHA256, ""])
@pytest.mark.parametrize("status", [202, 203, 204, 206])
def test_what_is_no_whole_file_is_refused(server, folder, one_sentence, status, sha256):
    server.status = status
    with one_sentence(server.url, str(status)):
        fetch(server.url, sha256)
    assert visible(folder) == []


@pytest.mark.parametrize("size", [150_000, 256_000, 300_000])
def test_a_file_that_changed_under_its_tag_starts_anew(broken_off, size):
    """Its length tells, or else the bytes that are asked for again."""
    broken_off.content = b"\7" * size
    assert fetch(broken_off.url).read_bytes() == broken_off.content


def test_an_endless_body_is_given_up(server, folder, monkeypatch, one_sentence):
    monkeypatch.setattr(download, "LARGEST", 200_000)
    server.says_its_length = False
    with one_sentence(server.url, "more than 200000 bytes"):
        fetch(server.url, SHA256)
    assert (folder / ".model.bin.part").stat().st_size == 0


@pytest.mark.parametrize(
    "address", ["ftp://127.0.0.1:9/model.bin", "file:///etc/hostname", "data:,x"]
)
def test_redirects_to_other_than_the_web_are_refused(server, monkeypatch, one_sentence, address):
    monkeypatch.setenv("ftp_proxy", f"http://127.0.0.1:{server.server_port}")
    server.moved_to = address
    with one_sentence(server.url.replace("model", "moved")):
        fetch(server.url.replace("model", "moved"))
    assert server.asked == []


def test_a_wrong_download_is_refused_and_forgotten(server, folder, one_sentence):
    server.content = b"login please"
    found = hashlib.sha256(server.content).hexdigest()
    with one_sentence(found, SHA256, server.url, "by hand", str(folder / "model.bin")):
        fetch(server.url, SHA256)
    assert visible(folder) == [] and not (folder / ".model.bin.part").exists()
    server.content = CONTENT
    assert fetch(server.url, SHA256).read_bytes() == CONTENT


def test_a_missing_file_is_told_in_one_sentence(server, folder, one_sentence):
    url = server.url.replace("model", "other")
    with one_sentence("404", url, "not published", str(folder / "other.bin")):
        fetch(url)


def test_no_network_is_told_in_one_sentence(server, folder, one_sentence):
    server.shutdown()
    server.server_close()
    with one_sentence("refused", server.url, SHA256, "by hand", str(folder / "model.bin")):
        fetch(server.url, SHA256)


def test_a_server_that_falls_silent_is_told_in_one_sentence(server, monkeypatch, one_sentence):
    monkeypatch.setattr(download, "TIMEOUT", 0.1)
    server.gate = threading.Event()
    with one_sentence("timed out", server.url):
        fetch(server.url, SHA256)
    server.gate.set()


def test_a_folder_that_cannot_be_made_is_told_in_one_sentence(server, folder, one_sentence):
    folder.write_text("a file where the folder should be")
    with one_sentence(server.url, str(folder / "model.bin")):
        fetch(server.url, SHA256)


def test_another_file_under_the_name_is_refused(folder, one_sentence):
    folder.mkdir()
    path = folder / "model.bin"
    path.write_bytes(b"something else")
    with one_sentence(str(path), SHA256, file_sha256(path), "https://nowhere.invalid/model.bin"):
        fetch("https://nowhere.invalid/model.bin", SHA256)
    assert path.read_bytes() == b"something else"


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://host/a.bin", "/a.bin", "https://host/", "https://host/.."]
)
def test_other_addresses_are_refused_in_one_sentence(url, one_sentence):
    with one_sentence(repr(url), "https://"):
        fetch(url)


@pytest.mark.parametrize("name", ["../a.bin", "sub/a.bin", "..", "/a.bin"])
def test_names_that_leave_the_folder_are_refused_in_one_sentence(name, one_sentence):
    with one_sentence(repr(name)):
        fetch("https://nowhere.invalid/model.bin", name=name)


@pytest.mark.parametrize("url", ["https://nowhere.invalid:port/a.bin", "http://[::1/a.bin"])
def test_addresses_that_mean_nothing_are_told_in_one_sentence(url, one_sentence):
    with one_sentence(url):
        fetch(url)


def test_two_at_once_download_once(server):
    server.gate, paths = threading.Event(), []
    threads = [
        threading.Thread(target=lambda: paths.append(fetch(server.url, SHA256))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.2)  # all have begun, one has asked
    server.gate.set()
    for thread in threads:
        thread.join()
    assert server.asked == [None] and [p.read_bytes() for p in paths] == [CONTENT] * 4


def test_a_hash_is_kept_until_the_file_changes(tmp_path, monkeypatch):
    path = tmp_path / "weights.bin"
    path.write_bytes(CONTENT)
    assert file_sha256(path) == SHA256
    with monkeypatch.context() as patch:
        patch.setattr(download, "_copy", lambda *_: pytest.fail("the hash is computed again"))
        assert file_sha256(path) == SHA256
    path.write_bytes(CONTENT[::-1])
    os.utime(path, ns=(0, 0))
    assert file_sha256(path) == hashlib.sha256(CONTENT[::-1]).hexdigest()
    path.with_name(".weights.bin.sha256").write_bytes(b"\xff\0")
    assert file_sha256(path) == hashlib.sha256(CONTENT[::-1]).hexdigest()


@pytest.mark.parametrize(
    "platform, setting, expected",
    [
        ("linux", "XDG_CACHE_HOME", "caches/s4s"),
        ("linux", "", "user/.cache/s4s"),
        ("darwin", "", "user/Library/Caches/s4s"),
        ("win32", "LOCALAPPDATA", "caches/s4s"),
        ("win32", "", "user/AppData/Local/s4s"),
    ],
)
def test_files_are_kept_where_the_system_keeps_caches(
    platform, setting, expected, tmp_path, monkeypatch
):
    for name in ("S4S_HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    if setting:
        monkeypatch.setenv(setting, str(tmp_path / "caches"))
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path / "user")
    assert home() == tmp_path / expected
