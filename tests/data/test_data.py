"""Data sets: files read, checked and fetched; augmentation and pairs as pure functions of their indices."""

import functools
import gzip
import hashlib
import http.server
import io
import os
import struct
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from fastcaps import data
from fastcaps.data import Dataset, MultiMNIST, cifar10, fashion_mnist, image_folder, mnist
from fastcaps.data.augment import augment, random_integers
from fastcaps.data.sources import Source, read_idx
from fastcaps.train.batches import Batches

REAL = Path(__file__).parents[3] / "shared" / "data" / "mnist"
NAMES = list(data.MNIST.files)


def idx(array: torch.Tensor) -> bytes:
    header = bytes([0, 0, 8, array.dim()]) + struct.pack(f">{array.dim()}I", *array.shape)
    return header + bytes(array.flatten().int().tolist())


def small_mnist(folder: Path, zipped=True, **replaced: bytes) -> dict[str, bytes]:
    """Four small files; returns their contents."""
    generator = torch.Generator().manual_seed(0)
    contents = {}
    for part, n in (("train", 6), ("t10k", 4)):
        contents[f"{part}-images-idx3-ubyte"] = idx(torch.randint(256, (n, 5, 4), generator=generator))
        contents[f"{part}-labels-idx1-ubyte"] = idx(torch.arange(n) % 10)
    contents = {f"{k}.gz" if zipped else k: gzip.compress(v) if zipped else v for k, v in contents.items()}
    for name, content in (contents | replaced).items():
        (folder / name).write_bytes(content)
    return contents | replaced


def test_grey_images_of_16_bits(tmp_path):
    from PIL import Image

    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    Image.fromarray(values).save(tmp_path / "a.png")
    image = data.read_image(tmp_path / "a.png")
    assert image.shape == (1, 8, 8)
    assert np.abs(image[0].numpy() - values / 65535).max() < 1 / 255
    assert data.read_image(tmp_path / "a.png", 3, (4, 6)).shape == (3, 4, 6)


def test_what_is_transparent_is_white_and_pictures_stand_upright(tmp_path):
    from PIL import Image

    drawn = Image.new("RGBA", (4, 3), (0, 0, 0, 0))
    drawn.putpixel((1, 2), (0, 0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    drawn.save(tmp_path / "a.png", exif=exif)
    for channels in (1, 3):
        image = data.read_image(tmp_path / "a.png", channels)
        assert image.shape == (channels, 4, 3)
        assert (1 - image).nonzero().tolist() == [[c, 1, 0] for c in range(channels)]
    Image.new("LA", (4, 3), (0, 0)).save(tmp_path / "b.png")
    assert data.read_image(tmp_path / "b.png").equal(torch.ones(1, 3, 4))


def test_an_idx_file_without_images(tmp_path):
    small_mnist(tmp_path, False)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(struct.pack(">4B3I", 0, 0, 8, 3, 0, 5, 4))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, 0))
    with pytest.raises(ValueError, match="t10k-images-idx3-ubyte holds no image"):
        mnist(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["", "MNIST/raw"])
def test_idx_files_plain_and_zipped(tmp_path, zipped, place):
    folder = tmp_path / place
    folder.mkdir(parents=True, exist_ok=True)
    small_mnist(folder, zipped)
    d = mnist(tmp_path)
    assert d.train_images.shape == (6, 1, 5, 4)
    assert d.test_images.shape == (4, 1, 5, 4)
    assert d.test_labels.tolist() == [0, 1, 2, 3]
    raw = read_idx(folder / ("train-images-idx3-ubyte" + (".gz" if zipped else "")))
    assert torch.equal((d.train_images * 255).round().byte()[:, 0], raw)
    assert torch.equal(fashion_mnist(folder).train_images, d.train_images)


@pytest.mark.skipif(not REAL.is_dir(), reason="real MNIST is not there")
def test_real_mnist():
    d = mnist(REAL)
    assert (d.train_images.shape, d.test_images.shape) == ((60000, 1, 28, 28), (10000, 1, 28, 28))
    assert d.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert torch.bincount(d.test_labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    digest = hashlib.md5((d.train_images * 255).round().byte().numpy().tobytes()).hexdigest()
    header = bytes([0, 0, 8, 3]) + struct.pack(">3I", 60000, 28, 28)
    whole = hashlib.md5(header + (d.train_images * 255).round().byte().numpy().tobytes()).hexdigest()
    assert whole == "6bbc9ace898e44ae57da46a324031adb" != digest


def test_missing_files_are_named_with_the_places(tmp_path):
    small_mnist(tmp_path)
    (tmp_path / NAMES[1]).unlink()
    (tmp_path / NAMES[2]).unlink()
    with pytest.raises(FileNotFoundError) as error:
        mnist(tmp_path)
    text = str(error.value)
    assert f"missing: {NAMES[1]} (or without .gz), {NAMES[2]} (or without .gz); looked for in" in text
    assert str(tmp_path / "MNIST" / "raw") in text
    with pytest.raises(FileNotFoundError, match=r"data_batch_1.bin.*or cifar-10-binary.tar.gz with all of them"):
        cifar10(tmp_path)


WRONG_FILES = {
    "labels out of range": ({NAMES[1]: gzip.compress(idx(torch.arange(6) + 9))}, "labels must be below 10, got 14"),
    "truncated": ({NAMES[0]: gzip.compress(idx(torch.zeros(6, 5, 4)))[:-9]}, "is broken"),
    "not zipped": ({NAMES[0]: b"hello"}, "is broken"),
    "not idx": (
        {NAMES[0]: gzip.compress(b"hello world")},
        "not an idx file of unsigned bytes: it begins with 68656c6c",
    ),
    "empty": ({NAMES[0]: gzip.compress(b"")}, "it begins with nothing"),
    "floats": ({NAMES[0]: gzip.compress(b"\0\0\x0d\1\0\0\0\1\0\0\0\0")}, "is not an idx file of unsigned bytes"),
    "too short": ({NAMES[0]: gzip.compress(idx(torch.zeros(6, 5, 4))[:-1])}, "holds 6 x 5 x 4 bytes, but it holds 119"),
    "other count": ({NAMES[1]: gzip.compress(idx(torch.zeros(5)))}, r"got \[6, 5, 4\] and \[5\]"),
    "swapped": ({NAMES[0]: gzip.compress(idx(torch.zeros(6)))}, r"must hold images \[N, H, W\]"),
    "other size": ({NAMES[2]: gzip.compress(idx(torch.zeros(4, 5, 5)))}, "images of different sizes"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_wrong_files(name, tmp_path):
    replaced, match = WRONG_FILES[name]
    small_mnist(tmp_path, **replaced)
    with pytest.raises(ValueError, match=match):
        mnist(tmp_path)


@pytest.mark.skipif(not REAL.exists(), reason="real MNIST is not here")
def test_two_sets_whose_files_have_the_same_names(tmp_path):
    with pytest.raises(ValueError, match="is of mnist, not of fashion-mnist"):
        fashion_mnist(REAL)
    small_mnist(tmp_path)
    (tmp_path / "fashion-mnist").mkdir()
    small_mnist(tmp_path / "fashion-mnist")
    (tmp_path / NAMES[0]).unlink()
    assert len(fashion_mnist(tmp_path).train_labels) == 6  # the folder of its own goes first


def cifar_files(folder: Path, wrong: dict[str, bytes] | None = None) -> dict[str, bytes]:
    contents = {}
    for n, name in enumerate(data.CIFAR10_FILES):
        rows = torch.zeros(10_000, 3073, dtype=torch.uint8)
        rows[:, 0], rows[:, 1:] = n, 40 * n
        rows[7, 1 + 1024 + 3] = 255  # green, first row, fourth column
        contents[name] = rows.numpy().tobytes()
    contents |= wrong or {}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return contents


def test_cifar10_files_and_archive(tmp_path):
    contents = cifar_files(tmp_path)
    d = cifar10(tmp_path)
    assert (d.train_images.shape, d.test_images.shape) == ((50_000, 3, 32, 32), (10_000, 3, 32, 32))
    assert d.train_labels[[0, 10_000, 49_999]].tolist() == [0, 1, 4]
    assert d.test_images[7, :, 0, 3].tolist() == pytest.approx([200 / 255, 1, 200 / 255])
    other = tmp_path / "other"
    other.mkdir()
    with tarfile.open(other / "cifar-10-binary.tar.gz", "w:gz", compresslevel=1) as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert torch.equal(cifar10(other).test_images, d.test_images)
    assert [path.name for path in other.iterdir()] == ["cifar-10-binary.tar.gz"]  # nothing was unpacked
    broken = (other / "cifar-10-binary.tar.gz").read_bytes()[:1000]
    (other / "cifar-10-binary.tar.gz").write_bytes(broken)
    with pytest.raises(ValueError, match="is broken"):
        cifar10(other)
    cifar_files(tmp_path, {"test_batch.bin": b"short"})
    with pytest.raises(ValueError, match=r"test_batch.bin must have 10000 x 3073 bytes, got 5"):
        cifar10(tmp_path)
    cifar_files(tmp_path, {"test_batch.bin": b"\x0b" * 3073 * 10_000})
    with pytest.raises(ValueError, match="labels must be below 10, got 11"):
        cifar10(tmp_path)


# -------------------------------------------------------------------------------------------------------------- fetched


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
    monkeypatch.setattr(data, "MNIST", Source(address, sums))


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
    monkeypatch.setattr(data, "MNIST", Source("http://127.0.0.1:9/", data.MNIST.files))
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
    monkeypatch.setattr(data, "MNIST", Source(f"http://127.0.0.1:{httpd.server_address[1]}/", data.MNIST.files))
    try:
        with pytest.raises((OSError, ValueError), match=r"cannot be fetched|not kept"):
            mnist(tmp_path / "root", download=True)
    finally:
        httpd.shutdown()
        httpd.server_close()
    assert list((tmp_path / "root" / "mnist").iterdir()) == []


# -------------------------------------------------------------------------------------------------- images of one's own


def picture(path: Path, size=(4, 3), colour=None, value=0):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB" if colour else "L", size, colour or value).save(path)


def test_image_folder(tmp_path):
    for n, name in enumerate(("cat", "ant")):
        picture(tmp_path / "train" / name / "1.png", value=51 * n)
        picture(tmp_path / "train" / name / "2.bmp", value=51 * n)
        picture(tmp_path / "test" / name / "3.png", value=102)
    (tmp_path / "train" / ".thumbnails").mkdir()
    d = image_folder(tmp_path)
    assert d.num_classes == 2
    assert d.train_images.shape == (4, 1, 3, 4)
    assert d.train_labels.tolist() == [0, 0, 1, 1]  # ant, cat
    assert d.train_images[:, 0, 0, 0].tolist() == pytest.approx([0.2, 0.2, 0, 0])
    assert image_folder(tmp_path, channels=3).test_images.shape == (2, 3, 3, 4)
    picture(tmp_path / "test" / "cat" / "4.png", colour=(255, 0, 51))
    assert image_folder(tmp_path).test_images[2, :, 0, 0].tolist() == pytest.approx([1, 0, 0.2])
    assert image_folder(tmp_path, channels=1).test_images.shape == (3, 1, 3, 4)


def test_image_folders_that_are_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*train"):
        image_folder(tmp_path)
    picture(tmp_path / "train" / "a" / "1.png")
    (tmp_path / "test" / "a").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"there is no image in .*test"):
        image_folder(tmp_path)
    picture(tmp_path / "test" / "a" / "1.png", size=(5, 3))
    with pytest.raises(ValueError, match=r"one size: .*1.png has 4x3 pixels, .*1.png 5x3"):
        image_folder(tmp_path)
    (tmp_path / "test" / "a" / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="is not an image that can be read"):
        image_folder(tmp_path)
    picture(tmp_path / "test" / "b" / "1.png")
    with pytest.raises(ValueError, match="classes in test but not in train: b"):
        image_folder(tmp_path)
    (tmp_path / "train" / "b").mkdir()
    with pytest.raises(FileNotFoundError, match=r"there is no image in .*b"):
        image_folder(tmp_path)


# ------------------------------------------------------------------------------------------------- functions of indices


def test_random_integers_are_uniform_and_depend_on_every_key():
    index = torch.arange(60_000)
    draws = [random_integers(10, index, *key) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**40, -3, 0))]
    for x in draws:
        assert 0 <= int(x.min()) <= int(x.max()) <= 9
        expected = len(index) / 10
        assert ((torch.bincount(x, minlength=10) - expected) ** 2 / expected).sum() < 40  # chi^2, 9 degrees: p = 8e-6
    for n, x in enumerate(draws):
        for y in draws[:n]:
            assert abs((x == y).double().mean() - 0.1) < 0.01
    assert torch.equal(random_integers(10, index[500:600], 0, 0, 0), draws[0][500:600])
    assert random_integers(1, index, 5).eq(0).all()


def test_augmentation_is_a_shift_and_depends_on_indices_alone():
    images, index = torch.rand(300, 2, 6, 7), torch.randperm(300)
    out = augment(images, index, seed=3, epoch=4, shift=2)
    again = augment(images[[5, 2]], index[[5, 2]], seed=3, epoch=4, shift=2)
    assert torch.equal(again, out[[5, 2]])
    assert not torch.equal(out, augment(images, index, seed=3, epoch=5, shift=2))
    seen = set()
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    for n in range(300):
        places = [(a, b) for a in range(5) for b in range(5) if torch.equal(out[n], padded[n, :, a : a + 6, b : b + 7])]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) == 25
    flipped = augment(images, index, seed=3, epoch=4, shift=0, flip=True)
    mirrored = torch.tensor([torch.equal(flipped[n], images[n].flip(2)) for n in range(300)])
    same = torch.tensor([torch.equal(flipped[n], images[n]) for n in range(300)])
    assert torch.equal(mirrored, ~same)
    assert 110 < int(mirrored.sum()) < 190
    assert torch.equal(augment(images, index, seed=0, epoch=0, shift=0), images)
    with pytest.raises(ValueError, match="shift must not be negative"):
        augment(images, index, seed=0, epoch=0, shift=-1)
    with pytest.raises(ValueError, match=r"index \[B\]"):
        augment(images, index[:3], seed=0, epoch=0)


def test_pairs_of_digits():
    images = torch.zeros(200, 1, 28, 28)
    images[:, :, 4:24, 4:24] = torch.rand(200, 1, 20, 20) * 0.9 + 0.1  # what fills the box of 20x20
    labels = torch.arange(200) % 10
    pairs = MultiMNIST(Dataset(images, labels, images[:50], labels[:50], 10))
    index = torch.arange(500)
    x, alone, y = pairs.batch(index, seed=1, epoch=2)
    assert (x.shape, alone.shape, y.shape) == ((500, 1, 36, 36), (500, 2, 36, 36), (500, 2))
    assert y[:, 0].ne(y[:, 1]).all()
    assert torch.equal(y[:, 0], labels[index % 200])
    assert torch.equal(x[:, 0], alone.amax(1))
    boxes = alone > 0
    shared, area = boxes.all(1).sum((1, 2)), boxes[:, 0].sum((1, 2))
    assert area.eq(400).all()  # nothing is cut off
    assert shared.min() >= 320
    assert shared.max() == 400
    corner = boxes[:, 0].flatten(1).int().argmax(1)
    assert {int(c) // 36 for c in corner} == set(range(4, 13))  # from -4 to 4 pixels
    again = pairs.batch(index[[7, 3]], seed=1, epoch=2)
    assert all(torch.equal(a, b[[7, 3]]) for a, b in zip(again, (x, alone, y), strict=True))
    assert not torch.equal(pairs.batch(index, seed=1, epoch=3)[0], x)
    assert pairs.batch(index, seed=1, epoch=2, train=False)[0].shape == (500, 1, 36, 36)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    root = tmp_path / "root"
    root.mkdir(mode=0o500)
    with pytest.raises(OSError, match="ermission denied"):
        mnist(root, download=True)


# -------------------------------------------------------------------------------------------------------------- batches


def batches_of(images, labels, batch_size, *, seed=0, shift=0, flip=False, **options) -> Batches:
    def sample(index, epoch):
        return augment(images[index], index, seed=seed, epoch=epoch, shift=shift, flip=flip), labels[index]

    return Batches(sample, len(labels), batch_size, seed=seed, **options)


def labels_of(batches: Batches) -> list[list[int]]:
    return [labels.tolist() for _, labels in batches]


def test_batches_are_permutations_that_change_with_epoch_and_seed():
    images, labels = torch.rand(103, 1, 4, 4), torch.arange(103)
    batches = batches_of(images, labels, 10, seed=0)
    epochs = [labels_of(batches) for _ in range(3)]
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == [10] * len(batches)
        assert len({n for batch in epoch for n in batch}) == 100
    assert epochs[0] != epochs[1] != epochs[2]
    assert labels_of(batches_of(images, labels, 10, seed=0)) == epochs[0]
    assert labels_of(batches_of(images, labels, 10, seed=1)) != epochs[0]
    left = [set(range(103)) - {n for batch in epoch for n in batch} for epoch in epochs]
    assert left[0] != left[1]  # it is not always the same ones that are dropped
    x, y = next(iter(batches))
    assert torch.equal(x, images[y])


def test_batches_go_on_from_any_state():
    images, labels = torch.rand(40, 1, 4, 4), torch.arange(40)
    options = {"seed": 3, "shift": 1, "flip": True}
    whole = batches_of(images, labels, 8, **options)
    everything = [batch for _ in range(3) for batch in whole]
    for stop in range(15):
        first = batches_of(images, labels, 8, **options)
        taken = 0
        while taken < stop:
            for _ in first:
                taken += 1
                if taken == stop:
                    break
        second = batches_of(images, labels, 8, **options)
        second.load_state_dict(first.state_dict())
        rest = [batch for _ in range(3) for batch in second][: 15 - stop]
        assert len(rest) == 15 - stop
        for a, b in zip(rest, everything[stop:], strict=True):
            assert torch.equal(a[0], b[0])
            assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_global_batches(world):
    images, labels = torch.rand(40, 1, 4, 4), torch.arange(40)
    one = list(batches_of(images, labels, 8, seed=0, shift=2))
    parts = [list(batches_of(images, labels, 8, seed=0, shift=2, rank=rank, world=world)) for rank in range(world)]
    for n, (x, y) in enumerate(one):
        for rank in range(world):
            assert torch.equal(parts[rank][n][0], x[rank::world])
            assert torch.equal(parts[rank][n][1], y[rank::world])


def test_parts_of_a_batch():
    images, labels = torch.rand(43, 1, 4, 4), torch.arange(43)
    whole = list(batches_of(images, labels, 12, shift=1))
    for rank in range(2):
        parts = batches_of(images, labels, 12, shift=1, rank=rank, world=2, accumulate=3)
        assert len(parts) == 9
        given = list(parts)
        for n, (x, y) in enumerate(whole):
            assert torch.equal(torch.cat([part[0] for part in given[3 * n : 3 * n + 3]]), x[rank::2])
            assert torch.equal(torch.cat([part[1] for part in given[3 * n : 3 * n + 3]]), y[rank::2])


@pytest.mark.parametrize(
    ("batch_size", "options", "match"),
    [
        (0, {}, "from 1 to 9"),
        (10, {}, "from 1 to 9"),
        (3, {"world": 2}, "multiple"),
        (4, {"accumulate": 3}, "multiple"),
        (8, {"world": 2, "accumulate": 8}, "multiple"),
        (4, {"world": 2, "rank": 2}, "rank"),
    ],
)
def test_batches_that_cannot_be(batch_size, options, match):
    with pytest.raises(ValueError, match=match):
        batches_of(torch.rand(9, 1, 4, 4), torch.arange(9), batch_size, **options)
