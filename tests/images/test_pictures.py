"""Decoding: every mode of pictures that people have, upright, cut and scaled; augmentation that follows from a seed."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from rarefy.data.pictures import Augmentation, for_evaluation, for_training, random_crop, whole
from tests.images.pictures import encoded, picture

SIZE = 16
PLAIN = Augmentation(scale=(1.0, 1.0), flip=False)


def flat(colour: tuple[int, ...] | int, mode: str = "RGB", size: tuple[int, int] = (20, 20)) -> Image.Image:
    return Image.new(mode, size, colour)


def colour_of(data: bytes) -> list[int]:
    """The colour of a picture of one colour, decoded for evaluation and as a whole alike."""
    seen = for_evaluation(data, SIZE, 1.0)
    assert (seen.dtype, tuple(seen.shape)) == (torch.uint8, (3, SIZE, SIZE))
    image = whole(data)
    assert image.mode == "RGB"
    colours = {tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()}
    assert colours == {tuple(pixel) for pixel in seen.flatten(1).T.tolist()}
    assert len(colours) == 1
    return list(colours.pop())


# Modes


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(flat((10, 200, 30)), "PNG"), [10, 200, 30]),
        (encoded(flat((10, 200, 30)), "BMP"), [10, 200, 30]),
        (encoded(flat((10, 200, 30)), "WEBP", lossless=True), [10, 200, 30]),
        (encoded(flat((10, 200, 30)), "PPM"), [10, 200, 30]),
        (encoded(flat(77, "L"), "PNG"), [77, 77, 77]),
        (encoded(flat(77, "L"), "JPEG"), [77, 77, 77]),
        (encoded(flat(1, "1"), "PNG"), [255, 255, 255]),
        (encoded(flat((10, 200, 30)).quantize(4), "PNG"), [10, 200, 30]),
        (encoded(flat((10, 200, 30)).quantize(4), "PNG", transparency=0), [255, 255, 255]),
        (encoded(flat((10, 200, 30)), "PNG", transparency=(10, 200, 30)), [255, 255, 255]),
        (encoded(flat((10, 200, 30)), "PNG", transparency=(1, 2, 3)), [10, 200, 30]),
        (encoded(flat((10, 200, 30, 0), "RGBA"), "PNG"), [255, 255, 255]),
        (encoded(flat((10, 200, 30, 255), "RGBA"), "PNG"), [10, 200, 30]),
        (encoded(flat((0, 100, 255, 51), "RGBA"), "PNG"), [204, 224, 255]),  # a fifth of it on white
        (encoded(flat((50, 0), "LA"), "PNG"), [255, 255, 255]),
        (encoded(flat((50, 255), "LA"), "PNG"), [50, 50, 50]),
    ],
)
def test_a_picture_of_any_mode_is_one_in_rgb(data, expected):
    assert colour_of(data) == expected


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize(("value", "grey"), [(0, 0), (0x8000, 128), (0xFFFF, 255), (255, 0)])
def test_sixteen_bits_are_scaled_to_eight(kind, value, grey):
    image = Image.fromarray(np.full((20, 20), value, np.uint16))
    assert image.mode == "I;16"
    assert colour_of(encoded(image, kind)) == [grey] * 3


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind):
    assert colour_of(encoded(flat((0, 255, 255, 0), "CMYK"), kind)) == pytest.approx([255, 0, 0], abs=3)


def test_pixels_that_are_floating_point_numbers_are_refused():
    data = encoded(Image.fromarray(np.zeros((20, 20), np.float32)), "TIFF")
    for decode in (whole, lambda data: for_evaluation(data, SIZE, 1.0)):
        with pytest.raises(ValueError, match="floating-point numbers, of which nobody knows what is white"):
            decode(data)


def test_the_first_picture_of_an_animation():
    for kind in ("GIF", "PNG", "WEBP"):
        first, *rest = (flat(colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
        assert colour_of(encoded(first, kind, save_all=True, append_images=rest, lossless=True)) == [255, 0, 0]


# Orientation


def turned(orientation: int, kind: str = "PNG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(size=(37, 24)), kind, exif=exif)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8, 9, 0])
def test_a_picture_stands_upright(orientation, kind):
    data = turned(orientation, kind)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert upright.size == ((24, 37) if 5 <= orientation <= 8 else (37, 24))
    assert np.array_equal(np.asarray(whole(data)), np.asarray(upright))
    again = encoded(upright, "PNG")
    assert torch.equal(for_evaluation(data, SIZE, 0.8), for_evaluation(again, SIZE, 0.8))
    how = Augmentation(jitter=0.2)
    one, other = (for_training(each, SIZE, how, random.Random(5)) for each in (data, again))
    assert torch.equal(one, other)


def test_what_a_png_says_behind_its_pixels():
    """eXIf may stand after IDAT."""
    before = turned(6)
    at = before.index(b"eXIf") - 4
    size = 12 + int.from_bytes(before[at : at + 4], "big")
    end = before.index(b"IEND") - 4
    after = before[:at] + before[at + size : end] + before[at : at + size] + before[end:]
    assert after.index(b"IDAT") < after.index(b"eXIf")
    assert torch.equal(for_evaluation(after, 16, 1.0), for_evaluation(before, 16, 1.0))


def test_damaged_metadata_harms_no_pixel():
    image = picture()
    plain, odd = encoded(image), encoded(image, exif=b"Exif\0\0MM\0*\xff\xff\xff\xffnonsense")
    assert odd != plain
    assert torch.equal(for_evaluation(odd, SIZE, 1.0), for_evaluation(plain, SIZE, 1.0))
    assert np.array_equal(np.asarray(whole(odd)), np.asarray(whole(plain)))


# Damage


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"<html>not found</html>",
        encoded(picture())[:2],
        encoded(picture())[:300],
        encoded(picture(size=(200, 200)))[:-3000],
        encoded(picture(), "PNG")[:-500],
        b"\0" * 30 + encoded(picture())[30:],
    ],
)
def test_damage_is_raised_and_never_a_grey_picture(data):
    for decode in (
        whole,
        lambda data: for_evaluation(data, SIZE, 1.0),
        lambda data: for_training(data, SIZE, PLAIN, random.Random(0)),
    ):
        with pytest.raises((OSError, SyntaxError)):
            decode(data)


# Cutting and scaling


def test_evaluation_sees_the_middle():
    image = flat((255, 0, 0), size=(100, 60))
    image.paste((0, 0, 255), (35, 15, 65, 45))  # the square of half the shorter side, in the middle
    data = encoded(image, "PNG")
    assert (for_evaluation(data, SIZE, 0.5) == torch.tensor([0, 0, 255]).view(3, 1, 1)).all()
    wider = for_evaluation(data, SIZE, 0.6)
    assert (wider[0, 0] > 0).all()
    assert wider[:, SIZE // 2, SIZE // 2].tolist() == [0, 0, 255]
    assert torch.equal(
        for_evaluation(data, SIZE, 1.0), for_evaluation(encoded(image.crop((20, 0, 80, 60)), "PNG"), SIZE, 1.0)
    )


def test_a_large_jpeg_is_decoded_small_and_looks_the_same():
    across, down = np.meshgrid(np.linspace(0, 255, 1200), np.linspace(0, 255, 900))
    image = Image.fromarray(np.stack((across, down, 255 - across), -1).astype(np.uint8))
    for kind in ("JPEG", "PNG"):
        seen = for_evaluation(encoded(image, kind), 32, 0.875).float()
        side = 0.875 * 900
        ramp = (1200 - side) / 2 + (torch.arange(32) + 0.5) * side / 32
        expected = (ramp / 1199 * 255).expand(32, 32)
        assert (seen[0] - expected).abs().max() < 3
        assert (seen[2] - (255 - expected)).abs().max() < 3


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (7, 5), (4000, 8)])
def test_small_and_narrow_pictures(size):
    data = encoded(flat((10, 200, 30), size=size), "PNG")
    expected = torch.tensor([10, 200, 30], dtype=torch.uint8).view(3, 1, 1).expand(3, SIZE, SIZE)
    assert torch.equal(for_evaluation(data, SIZE, 0.875), expected)
    for seed in range(5):
        assert torch.equal(for_training(data, SIZE, Augmentation(), random.Random(seed)), expected)


# Augmentation


def test_random_crops_lie_inside_and_are_as_large_as_asked():
    dice = random.Random(0)
    shares, aspects = [], []
    for _ in range(2000):
        left, top, right, bottom = random_crop(400, 300, (0.08, 0.6), dice)
        assert 0 <= left < right <= 400
        assert 0 <= top < bottom <= 300
        shares.append((right - left) * (bottom - top) / (400 * 300))
        aspects.append((right - left) / (bottom - top))
    assert 0.078 < min(shares) < 0.1 < 0.55 < max(shares) < 0.61
    assert 0.74 < min(aspects) < 0.8 < 1.25 < max(aspects) < 1.35


def test_a_crop_that_cannot_fit_is_the_middle():
    assert random_crop(100, 6, (0.9, 1.0), random.Random(0)) == (46, 0, 54, 6)
    assert random_crop(6, 100, (0.9, 1.0), random.Random(0)) == (0, 46, 6, 54)


def test_training_is_a_function_of_the_bytes_and_the_seed():
    data, how = encoded(picture(size=(60, 50))), Augmentation(jitter=0.3)
    made = [for_training(data, SIZE, how, random.Random(seed)) for seed in (1, 1, 2)]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    random.seed(9)
    torch.manual_seed(9)
    assert torch.equal(for_training(data, SIZE, how, random.Random(1)), made[0])


def test_the_whole_is_what_evaluation_sees_and_half_are_mirrored():
    data = encoded(picture(size=(32, 32)), "PNG")
    seen = for_evaluation(data, SIZE, 1.0)
    mirrored = 0
    for seed in range(40):
        made = for_training(data, SIZE, Augmentation(scale=(1.0, 1.0)), random.Random(seed))
        flip = not torch.equal(made, seen)
        assert torch.equal(made, seen.flip(2) if flip else seen)
        mirrored += flip
        assert torch.equal(for_training(data, SIZE, PLAIN, random.Random(seed)), seen)
    assert 10 < mirrored < 30


def test_jitter_changes_colours_no_further_than_asked():
    data = encoded(flat((100, 100, 100)), "PNG")
    greys = set()
    for seed in range(50):
        made = for_training(data, SIZE, Augmentation(flip=False, jitter=0.2), random.Random(seed))
        grey = int(made[0, 0, 0])
        assert (made == grey).all()  # one colour, and without saturation, it stays
        assert 79 <= grey <= 121
        greys.add(grey)
    assert len(greys) > 10
