"""Encoded pictures as networks want them: decoded by Pillow, cut, scaled by PyTorch, and augmented in training.

The random resized crop is that of Szegedy et al. (arXiv 1409.4842), as torchvision draws it. What is random comes from
a generator that the caller gives, so that a picture is a function of its bytes and of that alone.
"""

from __future__ import annotations

import io
import math
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance
from torch import Tensor

#: Left, top, right and bottom in pixels.
Box = tuple[float, float, float, float]

_ORIENTATION = 0x0112
#: What turns a picture as its EXIF orientation asks.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Augmentation:
    """What training does to a picture.

    Attributes:
        scale: the share of a picture's area that a random crop has, least and most.
        flip: whether half of them are mirrored.
        jitter: brightness, contrast and saturation are each multiplied by a number in [1 - jitter, 1 + jitter].

    """

    scale: tuple[float, float] = (0.08, 1.0)
    flip: bool = True
    jitter: float = 0.0


def for_training(data: bytes, size: int, how: Augmentation, dice: random.Random) -> Tensor:
    """Decode a picture and augment it: (3, size, size) uint8. Raises whatever a damaged one leads to."""
    pixels = _view(data, size, lambda width, height: random_crop(width, height, how.scale, dice))
    if how.flip and dice.random() < 0.5:
        pixels = pixels.flip(2)
    if not how.jitter:
        return pixels
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    kinds = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    dice.shuffle(kinds)
    for kind in kinds:
        image = kind(image).enhance(dice.uniform(1 - how.jitter, 1 + how.jitter))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def for_evaluation(data: bytes, size: int, crop: float) -> Tensor:
    """Decode the square in the middle whose side is ``crop`` of the picture's shorter one: (3, size, size) uint8."""

    def middle(width: int, height: int) -> Box:
        side = crop * min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return left, top, left + side, top + side

    return _view(data, size, middle)


def random_crop(width: int, height: int, scale: tuple[float, float], dice: random.Random) -> Box:
    """Draw a crop whose area is a share in ``scale`` of the whole, with an aspect ratio from 3/4 to 4/3.

    After ten crops that stick out it is the middle, in the nearest of these ratios.
    """
    for _ in range(10):
        area = width * height * dice.uniform(*scale)
        aspect = math.exp(dice.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = dice.randint(0, width - w), dice.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width * 4 / 3)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def whole(data: bytes) -> Image.Image:
    """Decode all of a picture, upright and in RGB. Raises whatever a damaged one leads to."""
    with _opened(data) as (opened, turn):
        image = _rgb(opened)
    return image.transpose(_TURNS[turn]) if turn in _TURNS else image


@contextmanager
def _opened(data: bytes) -> Iterator[tuple[Image.Image, int]]:
    """Open a picture that is not decoded yet; gives its EXIF orientation, too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata, which harms no pixel
        image = Image.open(io.BytesIO(data))
        if image.format == "PNG":
            image.load()  # whose metadata may stand behind its pixels
        yield image, _orientation(image)


def _view(data: bytes, size: int, choose: Callable[[int, int], Box]) -> Tensor:
    """Decode what ``choose`` names of a picture of that width and height, scaled: (3, size, size) uint8."""
    with _opened(data) as (opened, turn):
        width, height = opened.size if turn < 5 else opened.size[::-1]
        left, top, right, bottom = choose(width, height)
        # JPEG decodes at a half, a quarter or an eighth for a part of the time; twice what is wanted hides it.
        needed = min(1.0, 2 * size / min(right - left, bottom - top))
        opened.draft(None, (math.ceil(opened.width * needed), math.ceil(opened.height * needed)))
        image = _rgb(opened)
    if turn in _TURNS:
        image = image.transpose(_TURNS[turn])
    across, down = image.width / width, image.height / height
    left, top = min(round(left * across), image.width - 1), min(round(top * down), image.height - 1)
    right, bottom = max(round(right * across), left + 1), max(round(bottom * down), top + 1)
    box = (left, top, min(right, image.width), min(bottom, image.height))
    coarser = min(box[2] - left, box[3] - top) // (2 * size)
    part = image.reduce(coarser, box) if coarser > 1 else image.crop(box)
    # PyTorch scales bytes faster than Pillow does, by the same filter.
    pixels = torch.from_numpy(np.array(part)[None]).permute(0, 3, 1, 2)
    return F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)[0]


def _orientation(image: Image.Image) -> int:
    """Give the EXIF orientation of a picture; 1 where it has none that can be read."""
    if "exif" not in image.info or image.format == "TIFF":  # Pillow turns TIFF itself
        return 1
    try:
        turn = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # there is no end to what damaged metadata leads to, and the picture is whole without it
        return 1
    return turn if turn in _TURNS else 1


def _rgb(image: Image.Image) -> Image.Image:
    """Decode in RGB: 16 bits scaled to 8, what is transparent white, of an animation the first picture."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, of which nobody knows what is white")
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode == "RGB":
        image.load()
        return image
    return image.convert("RGB")
