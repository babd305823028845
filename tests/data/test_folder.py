"""Image folders: what is read, how colours come out, and what happens to files that cannot be read."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from cgspn.data.decode import middle, read_box, whole
from cgspn.data.folder import list_folder


def load(root, size, crop=True):
    """Class names, labels, and uint8 [N, 3, h, w]."""
    size = (size, size) if isinstance(size, int) else size
    names, files = list_folder(root)
    pixels = [read_box(file, size, middle(size) if crop else whole) for file, _ in files]
    return names, [label for _, label in files], torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


def save(path, color=(255, 0, 0), size=(20, 16), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)


def test_sub_folders_are_classes(tmp_path):
    save(tmp_path / "dog" / "1.png", (0, 255, 0))
    save(tmp_path / "cat" / "b.png", (255, 0, 0))
    save(tmp_path / "cat" / "deep" / "a.PNG", (0, 0, 255))
    save(tmp_path / ".hidden" / "x.png")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    names, labels, images = load(tmp_path, (8, 12))
    assert names == ("cat", "dog")
    assert labels == [0, 0, 1]
    assert images.shape == (3, 3, 8, 12)
    assert images[:, :, 4, 6].tolist() == [[255, 0, 0], [0, 0, 255], [0, 255, 0]]


def test_a_flat_folder_is_one_class(tmp_path):
    for i in range(3):
        save(tmp_path / "pets" / f"{i}.png", (i, i, i))
    names, _, images = load(tmp_path / "pets", 4)
    assert names == ("pets",)
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2]


def test_crop_and_squeeze(tmp_path):
    # Red, green, blue stripes: the crop shows the middle one only, the squeeze all three.
    stripes = np.repeat(np.eye(3, dtype=np.uint8) * 255, 10, axis=0)[None].repeat(10, 0)
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    cropped = load(tmp_path, 10)[2][0]
    assert cropped[:, 5, 1].tolist() == cropped[:, 5, 8].tolist() == [0, 255, 0]
    squeezed = load(tmp_path, 10, crop=False)[2][0]
    assert squeezed[:, 5, 1].tolist() == [255, 0, 0]
    assert squeezed[:, 5, 8].tolist() == [0, 0, 255]


def test_exif_orientation_is_applied(tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :4] = 255  # bright on the left
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: bright on top
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    out = load(tmp_path, 8)[2][0].float()
    assert out[:, :3].mean() > 230
    assert out[:, 5:].mean() < 25


def test_modes(tmp_path):
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    palette.save(tmp_path / "a_palette.png")
    save(tmp_path / "b_alpha.png", (200, 0, 0, 0), mode="RGBA")
    save(tmp_path / "c_half.png", (0, 0, 0, 128), mode="RGBA")
    save(tmp_path / "d_cmyk.jpg", (0, 255, 255, 0), mode="CMYK", quality=95)
    Image.fromarray(np.full((4, 4), 0xC0C0, np.uint16)).save(tmp_path / "e_grey16.png")
    save(tmp_path / "f_bits.png", 1, mode="1")
    save(tmp_path / "g_clear.gif", 3, mode="P", transparency=3)
    colors = load(tmp_path, 4)[2][:, :, 2, 2].tolist()
    assert colors[0] == [10, 200, 30]
    assert colors[1] == [255, 255, 255]  # nothing but transparency: white, not the colour under it
    assert colors[2] == [127, 127, 127]
    assert np.abs(np.array(colors[3]) - [255, 0, 0]).max() < 12
    assert colors[4] == [192, 192, 192]  # 0xC0C0 / 257; dividing by 256 would give 193
    assert colors[5] == colors[6] == [255, 255, 255]


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no such folder: {tmp_path}/away"):
        list_folder(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match=f"no image files in {tmp_path}"):
        list_folder(tmp_path)
    (tmp_path / "file.png").write_text("")
    with pytest.raises(NotADirectoryError, match=r"file\.png"):
        list_folder(tmp_path / "file.png")
    save(tmp_path / "sub" / "a.png")
    with pytest.raises(ValueError, match="beside sub-folders"):
        list_folder(tmp_path)


def test_images_agree_with_the_transforms(tmp_path):
    # The same photograph through the folder (Pillow) and through the tensor transform must match.
    from cgspn.data.transforms import center_crop, to_float

    noise = torch.rand(1, 3, 9, 13, generator=torch.Generator().manual_seed(0))
    pixels = (torch.nn.functional.interpolate(noise, (90, 130), mode="bicubic") * 255).clamp(0, 255).to(torch.uint8)
    Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    got = load(tmp_path, 32)[2][0].float()
    expected = center_crop(to_float(pixels), 32)[0] * 255
    assert (got - expected).abs().mean() < 1.5


def test_boxes_stay_inside_pictures_of_any_size():
    # rounding once put the middle of a 190x116 picture at -1e-14, which Pillow refuses
    wanted = [(28, 28), (10, 14), (224, 224), (37, 29)]
    for height in range(1, 60, 7):
        for width in range(1, 700, 23):
            encoded = io.BytesIO()
            Image.new("L", (width, height), 200).save(encoded, "JPEG" if height % 2 else "PNG")
            size = wanted[width % 4]
            pixels = read_box(encoded, size, middle(size))
            assert pixels.shape == (*size, 3)
            assert abs(int(pixels.mean()) - 200) < 3
    for height, width in ((116, 190), (506, 727)):
        encoded = io.BytesIO()
        Image.new("RGB", (width, height)).save(encoded, "PNG")
        assert read_box(encoded, (28, 28), middle((28, 28))).shape == (28, 28, 3)
