"""Published data sets: files read, checked and refused."""

import gzip
import hashlib
import io
import struct
import tarfile
from pathlib import Path

import pytest
import torch
from support.edits import damaged, fine_or_a_line_about
from support.image_files import MNIST, NAMES, idx, small_mnist

from fastcaps.data import cifar10, datasets, digits, fashion_mnist, mnist, multi_digit
from fastcaps.data.sources import read_idx


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


@pytest.mark.skipif(not MNIST.is_dir(), reason="real MNIST is not there")
def test_real_mnist():
    d = mnist(MNIST)
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
    "sizes that overflow": (
        {NAMES[0]: gzip.compress(b"\0\0\x08\x04" + struct.pack(">4I", 2**31, 2**31, 4, 0))},
        "says that",
    ),
    "images of no size": ({NAMES[0]: gzip.compress(idx(torch.zeros(6, 0, 4)))}, "holds no image"),
    "many axes": (
        {NAMES[0]: gzip.compress(b"\0\0\x08\xff" + struct.pack(">255I", *[1] * 255) + b"a")},
        "must hold images",
    ),
    "other size": ({NAMES[2]: gzip.compress(idx(torch.zeros(4, 5, 5)))}, "images of different sizes"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_wrong_files(name, tmp_path):
    replaced, match = WRONG_FILES[name]
    small_mnist(tmp_path, **replaced)
    with pytest.raises(ValueError, match=match):
        mnist(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files_are_read_or_refused_in_a_line(tmp_path, zipped):
    for seed in range(100):
        contents = list(small_mnist(tmp_path, zipped).items())
        name, content = contents[seed % 4]
        header = content if zipped or seed % 2 else content[:16]  # every other edit of plain files hits the sizes
        (tmp_path / name).write_bytes(damaged(header, seed) + content[len(header) :])
        with fine_or_a_line_about(tmp_path, f"seed {seed}, {name}"):
            mnist(tmp_path)


@pytest.mark.skipif(not MNIST.exists(), reason="real MNIST is not here")
def test_two_sets_whose_files_have_the_same_names(tmp_path):
    with pytest.raises(ValueError, match="is of mnist, not of fashion-mnist"):
        fashion_mnist(MNIST)
    small_mnist(tmp_path)
    (tmp_path / "fashion-mnist").mkdir()
    small_mnist(tmp_path / "fashion-mnist")
    (tmp_path / NAMES[0]).unlink()
    assert len(fashion_mnist(tmp_path).train_labels) == 6  # the folder of its own goes first


ROWS = 10  # of each file, where it is not the size that is tested


def cifar_files(folder: Path) -> dict[str, bytes]:
    contents = {}
    for n, name in enumerate(datasets.CIFAR10_FILES):
        rows = torch.zeros(ROWS, 3073, dtype=torch.uint8)
        rows[:, 0], rows[:, 1:] = n, 40 * n
        rows[7, 1 + 1024 + 3] = 255  # green, first row, fourth column
        contents[name] = rows.numpy().tobytes()
        (folder / name).write_bytes(contents[name])
    return contents


def test_cifar10_files_and_archive(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "CIFAR10_ROWS", ROWS)
    contents = cifar_files(tmp_path)
    d = cifar10(tmp_path)
    assert (d.train_images.shape, d.test_images.shape) == ((5 * ROWS, 3, 32, 32), (ROWS, 3, 32, 32))
    assert d.train_labels[[0, ROWS, 5 * ROWS - 1]].tolist() == [0, 1, 4]
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
    whole = (other / "cifar-10-binary.tar.gz").read_bytes()
    (other / "cifar-10-binary.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is broken"):
        cifar10(other)
    monkeypatch.setattr(datasets, "fetch", lambda source, name, root: (root / name).write_bytes(whole))
    assert torch.equal(cifar10(other, download=True).test_images, d.test_images)
    (tmp_path / "test_batch.bin").write_bytes(b"\x0b" * 3073 * ROWS)
    with pytest.raises(ValueError, match="labels must be below 10, got 11"):
        cifar10(tmp_path)


def test_a_file_of_cifar10_has_10000_images(tmp_path):
    for name in datasets.CIFAR10_FILES:
        (tmp_path / name).write_bytes(b"short")
    with (tmp_path / "data_batch_1.bin").open("wb") as file:
        file.truncate(10_000 * 3073)  # zeros, which are images as well
    with pytest.raises(ValueError, match=r"data_batch_2.bin must have 10000 x 3073 bytes, got 5"):
        cifar10(tmp_path)


@pytest.mark.parametrize("count", [2, 3])
def test_numbers_are_digits_side_by_side(count):
    single, data = digits(), multi_digit(count, num_train=300, num_test=40)
    assert data.num_classes == 10**count
    known = {image.numpy().tobytes(): int(label) for image, label in zip(*single.tensors[:2], strict=True)}
    for image, label in zip(data.train_images, data.train_labels, strict=True):
        parts = [part.contiguous() for part in image.split(8, dim=2)]
        assert int("".join(str(known[part.numpy().tobytes()]) for part in parts)) == label
    tested = {image.numpy().tobytes() for image in single.test_images}
    assert all(image[:, :, :8].contiguous().numpy().tobytes() in tested for image in data.test_images)


def test_numbers_are_a_function_of_seed_and_index():
    data, longer = multi_digit(2, num_train=30, num_test=5), multi_digit(2, num_train=60, num_test=5)
    assert torch.equal(longer.train_images[:30], data.train_images)
    assert not torch.equal(multi_digit(2, seed=1, num_train=30, num_test=5).train_images, data.train_images)
    assert multi_digit(3).train_labels.unique().numel() > 990  # about 20 images of each of 1000 classes


@pytest.mark.parametrize("count", [0, 5])
def test_numbers_have_one_to_four_digits(count):
    with pytest.raises(ValueError, match="count must be"):
        multi_digit(count)
