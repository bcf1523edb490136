"""Downloads: checked, kept whole or not at all."""

import functools
import hashlib
import http.server
import os
import threading

import pytest
import torch
from support.image_files import NAMES, small_mnist

from fastcaps._atomic import whole_file, write_whole
from fastcaps.data import datasets, mnist
from fastcaps.data.sources import Source


@pytest.fixture
def server(tmp_path):
    """A folder served on this machine: its path and its address."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{httpd.server_address[1]}/"
    httpd.shutdown()
    httpd.server_close()


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


def test_a_connection_that_breaks_off(tmp_path, monkeypatch):
    """The server promises more than it sends."""

    class Half(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"half")

        def log_message(self, *args):
            pass

    httpd = http.server.HTTPServer(("127.0.0.1", 0), Half)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setattr(datasets, "MNIST", Source(f"http://127.0.0.1:{httpd.server_address[1]}/", datasets.MNIST.files))
    try:
        with pytest.raises((OSError, ValueError), match=r"cannot be fetched|not kept"):
            mnist(tmp_path / "root", download=True)
    finally:
        httpd.shutdown()
        httpd.server_close()
    assert list((tmp_path / "root" / "mnist").iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    root = tmp_path / "root"
    root.mkdir(mode=0o500)
    with pytest.raises(OSError, match="ermission denied"):
        mnist(root, download=True)


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a"

    def stop_halfway():
        with whole_file(path, suffix=".own") as file:
            file.write(b"half of it")
            assert sorted(there.name for there in tmp_path.iterdir()) == ["a", "a.own"]
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


def test_processes_that_fetch_at_the_same_time(server, tmp_path, monkeypatch):
    """Another process is in the middle of the same file."""
    folder, address = server
    made = tmp_path / "made"
    made.mkdir()
    contents = small_mnist(made)
    served(monkeypatch, folder, address, contents)
    root = tmp_path / "root" / "mnist"
    root.mkdir(parents=True)
    theirs = root / f"{NAMES[0]}.{os.getpid() + 1}.partial"
    theirs.write_bytes(b"half")
    mnist(tmp_path / "root", download=True)
    assert (root / NAMES[0]).read_bytes() == contents[NAMES[0]]
    assert theirs.read_bytes() == b"half"
