"""Downloads: checked, kept whole or not at all."""

import contextlib
import errno
import functools
import hashlib
import http.server
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.image_files import NAMES, small_mnist
from support.processes import Forked

from fastcaps import _atomic
from fastcaps._atomic import whole_file, write_whole
from fastcaps.data import datasets, mnist, sources
from fastcaps.data.sources import Source


@contextlib.contextmanager
def serving(handler: Callable[..., http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server on this machine: its address."""
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()  # looks so often whether to end
    yield f"http://127.0.0.1:{httpd.server_address[1]}/"
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def server(tmp_path):
    """A folder served on this machine: its path and its address."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with serving(functools.partial(Quiet, directory=folder)) as address:
        yield folder, address


def served(monkeypatch, folder, address, contents):
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    sums = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(datasets, "MNIST", Source(address, sums))


def test_a_download_is_checked_and_kept(server, tmp_path, monkeypatch):
    folder, address = server
    made = tmp_path / "made"
    made.mkdir()
    served(monkeypatch, folder, address, small_mnist(made))
    root = tmp_path / "new" / "root"
    d = mnist(root, download=True)
    assert sorted(path.name for path in (root / "mnist").iterdir()) == sorted(NAMES)
    (folder / NAMES[0]).unlink()
    assert torch.equal(mnist(root, download=True).train_images, d.train_images)  # what is there is not fetched again


def test_a_wrong_or_broken_download_is_not_left_behind(server, tmp_path, monkeypatch):
    folder, address = server
    made = tmp_path / "made"
    made.mkdir()
    contents = small_mnist(made)
    served(monkeypatch, folder, address, contents)
    (folder / NAMES[1]).write_bytes(contents[NAMES[1]] + b"more")
    root = tmp_path / "root"
    with pytest.raises(ValueError, match=rf"{NAMES[1]} has the MD5 sum \w+, not \w+: not kept"):
        mnist(root, download=True)
    assert [path.name for path in (root / "mnist").iterdir()] == [NAMES[0]]
    (folder / NAMES[1]).unlink()
    with pytest.raises(OSError, match="cannot be fetched: HTTP Error 404"):
        mnist(root, download=True)
    monkeypatch.setattr(datasets, "MNIST", Source("http://127.0.0.1:9/", datasets.MNIST.files))
    with pytest.raises(OSError, match="cannot be fetched"):
        mnist(root, download=True)
    assert [path.name for path in (root / "mnist").iterdir()] == [NAMES[0]]


@pytest.fixture
def answering(tmp_path, monkeypatch):
    """A function that lets a server on this machine give an answer, byte for byte, and fetches MNIST from it."""
    answer = {}

    class Raw(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.wfile.write(answer["raw"].replace(b"PORT", str(self.server.server_address[1]).encode()))
            if answer["hangs"]:
                time.sleep(1)
            self.close_connection = True

        def log_message(self, *args):
            pass

    def fetch_from(raw: bytes, hangs: bool = False) -> None:
        answer.update(raw=raw, hangs=hangs)
        mnist(tmp_path / "root", download=True)

    with serving(Raw) as address:
        monkeypatch.setattr(datasets, "MNIST", Source(address, datasets.MNIST.files))
        yield fetch_from


ANSWERS = {
    "nothing": b"",
    "no status": b"hello\r\n\r\n",
    "a status that is no number": b"HTTP/1.1 OK OK\r\n\r\n",
    "a long line": b"HTTP/1.1 " + b"x" * 70_000,
    "many headers": b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n",
    "half of the content": b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf",
    "half of a chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1000\r\nhel",
    "a chunk of no size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nhello\r\nhello\r\n",
    "not found": b"HTTP/1.1 404 Not Found\r\n\r\n",
    "moved to itself": b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:PORT/train-images-idx3-ubyte.gz\r\n\r\n",
    "moved to no address": b"HTTP/1.1 302 Found\r\nLocation: http://[/\r\n\r\n",
    "moved to no port": b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:http/\r\n\r\n",
    "moved to a file": b"HTTP/1.1 302 Found\r\nLocation: file:///etc/hostname\r\n\r\n",
    "no TLS": b"HTTP/1.1 302 Found\r\nLocation: https://127.0.0.1:PORT/\r\n\r\n",
}


@pytest.mark.parametrize("name", ANSWERS)
def test_whatever_a_server_answers_the_message_is_a_line_that_names_the_address(answering, tmp_path, name):
    with pytest.raises(OSError, match=rf"^http://127.0.0.1:\d+/{NAMES[0]} cannot be fetched: .+") as error:
        answering(ANSWERS[name])
    assert len(str(error.value).splitlines()) == 1
    assert list((tmp_path / "root" / "mnist").iterdir()) == []


def test_a_server_that_says_nothing_more(answering, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "TIMEOUT", 0.1)
    with pytest.raises(OSError, match=r"cannot be fetched: .*timed out"):
        answering(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf", hangs=True)
    assert list((tmp_path / "root" / "mnist").iterdir()) == []


@pytest.mark.parametrize("zipped", [True, False])
def test_a_broken_file_is_fetched_anew(server, tmp_path, monkeypatch, zipped):
    folder, address = server
    made, root = tmp_path / "made", tmp_path / "root"
    made.mkdir()
    (root / "mnist").mkdir(parents=True)
    contents = small_mnist(made)
    served(monkeypatch, folder, address, contents)
    local = small_mnist(root / "mnist", zipped)
    broken = root / "mnist" / next(iter(local))
    broken.write_bytes(broken.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"^{broken} .*broken|^{broken} says that it holds"):
        mnist(root)
    for download in (True, False):  # a whole file goes before a broken one from now on
        assert torch.equal(mnist(root, download=download).train_images, mnist(made).train_images)
    assert (root / "mnist" / NAMES[0]).read_bytes() == contents[NAMES[0]]


def test_a_broken_file_and_a_download_that_fails(server, tmp_path, monkeypatch):
    folder, address = server
    root = tmp_path / "mnist"
    root.mkdir()
    served(monkeypatch, folder, address, small_mnist(root))
    (root / NAMES[0]).write_bytes(b"broken")
    (folder / NAMES[0]).write_bytes(b"wrong")
    with pytest.raises(ValueError, match=rf"{NAMES[0]} is broken: .*; http.*{NAMES[0]} has the MD5 sum .*: not kept"):
        mnist(tmp_path, download=True)
    assert (root / NAMES[0]).read_bytes() == b"broken"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    root = tmp_path / "root"
    root.mkdir(mode=0o500)
    with pytest.raises(OSError, match="ermission denied"):
        mnist(root, download=True)


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a"

    def stop_halfway():
        with whole_file(path) as file:
            file.write(b"half of it")
            assert len(list(tmp_path.glob("a.*.partial"))) == 1
            raise KeyError

    write_whole(path, b"first")
    with pytest.raises(KeyError):
        stop_halfway()
    assert path.read_bytes() == b"first"
    with whole_file(path) as file:
        file.write(b"sec")
        file.write(b"ond")
    assert path.read_bytes() == b"second"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_never_mix(tmp_path):
    path = tmp_path / "a"
    with whole_file(path) as one, whole_file(path) as other:
        for n in range(3):
            one.write(b"one")
            other.write(b"other")
            one.flush()
            other.flush()
            assert len(list(tmp_path.iterdir())) == 2, n
    assert path.read_bytes() == b"one" * 3  # the outer block ends last


def _write_often(path: Path) -> int:
    os.fsync = lambda file: None  # most of the time would go by waiting for the disk
    for _ in range(100):
        write_whole(path, b"whole" * 1000)
    return 0


@pytest.mark.process
def test_processes_that_write_the_same_file(tmp_path):
    """What one has written whole and not yet renamed, another does not take for a dead process's."""
    writers = [Forked(_write_often, tmp_path / "a", stderr=tmp_path / f"stderr-{n}") for n in range(3)]
    assert [writer.wait() for writer in writers] == [(0, "")] * 3
    assert (tmp_path / "a").read_bytes() == b"whole" * 1000


def test_what_dead_writers_left_is_removed_and_nothing_else(tmp_path):
    left = ["a.partial", "a.4711.partial", "a.0123abcd.partial"]
    others = ["ab.0123abcd.partial", "a.mine.partial", "a.0123abcd.partial.txt", "partial"]
    for name in (*left, *others):
        (tmp_path / name).write_bytes(b"half")
    write_whole(tmp_path / "a", b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["a", *others])


def test_a_partial_file_that_is_removed_before_it_is_locked(tmp_path, monkeypatch):
    """Another process takes it for one of a dead process."""
    removed, lock = [], _atomic.lock

    def slow(file):
        if not removed:
            removed.append(Path(file.name))
            removed[0].unlink()
        return lock(file)

    monkeypatch.setattr(_atomic, "lock", slow)
    write_whole(tmp_path / "a", b"whole")
    assert removed[0].name.startswith("a.")
    assert (tmp_path / "a").read_bytes() == b"whole"


def full(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_said_with_the_name_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'a'}'"):
        write_whole(tmp_path / "a", b"content")
    assert list(tmp_path.iterdir()) == []


def test_processes_that_fetch_at_the_same_time(server, tmp_path, monkeypatch):
    """Another process is in the middle of the same file, and a third one died there."""
    folder, address = server
    made = tmp_path / "made"
    made.mkdir()
    contents = small_mnist(made)
    served(monkeypatch, folder, address, contents)
    root = tmp_path / "root" / "mnist"
    root.mkdir(parents=True)
    (root / f"{NAMES[0]}.0123abcd.partial").write_bytes(b"half")
    with whole_file(root / NAMES[0]) as theirs:
        theirs.write(b"theirs")
        mnist(tmp_path / "root", download=True)
        assert (root / NAMES[0]).read_bytes() == contents[NAMES[0]]
    assert (root / NAMES[0]).read_bytes() == b"theirs"
    assert not list(root.glob("*.partial"))
