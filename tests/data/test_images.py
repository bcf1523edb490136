"""Image files and image folders."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.edits import damaged, fine_or_a_line_about

from fastcaps.data import image_folder, read_image


def test_grey_images_of_16_bits(tmp_path):
    from PIL import Image

    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    Image.fromarray(values).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.shape == (1, 8, 8)
    assert np.abs(image[0].numpy() - values / 65535).max() < 1 / 255
    assert read_image(tmp_path / "a.png", 3, (4, 6)).shape == (3, 4, 6)


def test_what_is_transparent_is_white_and_pictures_stand_upright(tmp_path):
    from PIL import Image

    drawn = Image.new("RGBA", (4, 3), (0, 0, 0, 0))
    drawn.putpixel((1, 2), (0, 0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    drawn.save(tmp_path / "a.png", exif=exif)
    for channels in (1, 3):
        image = read_image(tmp_path / "a.png", channels)
        assert image.shape == (channels, 4, 3)
        assert (1 - image).nonzero().tolist() == [[c, 1, 0] for c in range(channels)]
    Image.new("LA", (4, 3), (0, 0)).save(tmp_path / "b.png")
    assert read_image(tmp_path / "b.png").equal(torch.ones(1, 3, 4))


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


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged EXIF
@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp"])
def test_damaged_images_are_read_or_refused_in_a_line(tmp_path, suffix):
    from PIL import Image

    path, exif = tmp_path / f"a.{suffix}", Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (9, 7), (200, 30, 90)).save(path, exif=exif)
    content = path.read_bytes()
    for seed in range(150):
        path.write_bytes(damaged(content, seed))
        with fine_or_a_line_about(path, f"seed {seed}"):
            read_image(path, 1, (8, 8))


def test_hidden_files_in_image_folders_do_not_count(tmp_path):
    for name in ("train/ant/1.png", "test/ant/1.png", "train/ant/.ipynb_checkpoints/1-checkpoint.png"):
        picture(tmp_path / name)
    (tmp_path / "train" / "__MACOSX" / "ant").mkdir(parents=True)
    for name in ("train/ant/._1.png", "train/__MACOSX/._ant", "test/ant/Thumbs.db", "test/ant/.DS_Store", "train/.png"):
        (tmp_path / name).write_bytes(b"no image")
    d = image_folder(tmp_path)
    assert (d.class_names, d.num_train, d.num_test) == (("ant",), 1, 1)


def test_image_folders_that_are_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*train"):
        image_folder(tmp_path)
    picture(tmp_path / "train" / "a" / "1.png")
    (tmp_path / "test" / "a").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"there is no image in .*test"):
        image_folder(tmp_path)
    picture(tmp_path / "test" / "a" / "1.png", size=(5, 3))
    with pytest.raises(ValueError, match=r"one size, .*: .*1.png has 4x3 pixels, .*1.png 5x3"):
        image_folder(tmp_path)
    assert image_folder(tmp_path, size=(3, 4)).test_images.shape == (1, 1, 3, 4)
    (tmp_path / "test" / "a" / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="is not an image that can be read"):
        image_folder(tmp_path)
    picture(tmp_path / "test" / "b" / "1.png")
    with pytest.raises(ValueError, match="classes in test but not in train: b"):
        image_folder(tmp_path)
    (tmp_path / "train" / "b").mkdir()
    with pytest.raises(FileNotFoundError, match=r"there is no image in .*b"):
        image_folder(tmp_path)
