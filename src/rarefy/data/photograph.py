"""Synthetic photographs of printed characters, a batch at a time, on any device.

A drawing, dark on light, becomes a photograph of a printed line: neighbours, thicker or thinner strokes, rotation,
perspective, an elastic warp, textured paper and ink, shadow, bars that cover a part, blur, noise and JPEG's blocks.
There is no loop over pictures. What each nuisance reaches at strength 1 is said where it is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

#: JPEG's table for luminance (ITU-T T.81, annex K), here for all three channels.
_JPEG = (
    *((16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55), (14, 13, 16, 24, 40, 57, 69, 56)),
    *((14, 17, 22, 29, 51, 87, 80, 62), (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92)),
    *((49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99)),
)


def photograph(drawings: Tensor, strength: float = 1.0, *, generator: Generator) -> Tensor:
    """Photograph drawings: (B, 3, S, S) uint8, dark on light, to (B, 3, S, S) float32 in [0, 1].

    Args:
        drawings: their side S is a multiple of 8.
        strength: above 0; scales every nuisance, and lowers the contrast. At 1 some 7 % of the characters of
            ``rarefy data glyphs`` cannot be read by people.
        generator: what is random comes from it; one on the CPU gives the same photographs for every device, but for
            rounding.

    Raises:
        ValueError: a side that is no multiple of 8, or a strength that is not above 0.

    """
    side = drawings.shape[2]
    if side % 8 or drawings.shape[3] != side:
        raise ValueError(f"drawings must be square, with a side that 8 divides, got {tuple(drawings.shape[2:])}")
    if not 0 < strength < math.inf:
        raise ValueError(f"strength must be above 0, and finite, got {strength}")
    if not len(drawings):  # of a batch whose pictures are all damaged
        return drawings.float()
    ink = 1 - drawings.float().mean(1, keepdim=True) / 255
    return _Photographs(len(drawings), side, strength, generator, drawings.device).of(ink)


class _Photographs:
    """The random numbers of a batch, and what is done with them. Shapes leave the first, the batch, out."""

    def __init__(self, n: int, side: int, strength: float, generator: Generator, device: torch.device) -> None:
        self.n, self.side, self.strength, self.generator, self.device = n, side, strength, generator, device

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        drawn = torch.rand(self.n, *shape, device=self.generator.device, generator=self.generator)
        return drawn.to(self.device) * (high - low) + low

    def normal(self, *shape: int) -> Tensor:
        drawn = torch.randn(self.n, *shape, device=self.generator.device, generator=self.generator)
        return drawn.to(self.device)

    def happens(self, share: float, *shape: int) -> Tensor:
        """1 in so large a share of the pictures, otherwise 0."""
        return (self.uniform(*shape) < share).float()

    def of(self, ink: Tensor) -> Tensor:
        """Photograph drawings (B, 1, S, S) whose ink is 1 and whose paper is 0."""
        k, side = self.strength, self.side
        mask = self._printed(ink)
        # Worn ink; then paper and ink of unlike lightness, each with a cast and a texture; light on dark in 40 %.
        wear = self.uniform(1, 1, 1, low=0.8, high=4.0) / k
        mask = mask * (1 - 0.8 * (self._texture((8, 16, 32), 1) - wear).sigmoid())
        contrast = 0.2 + 0.7 * self.uniform(1, 1, 1) ** (0.5 + k)
        dark = self.uniform(1, 1, 1) * (1 - contrast)
        inverted = self.happens(0.4, 1, 1, 1)
        paper = torch.lerp(dark + contrast, dark, inverted) + self.normal(3, 1, 1) * 0.08
        colour = torch.lerp(dark, dark + contrast, inverted) + self.normal(3, 1, 1) * 0.08
        rough = 0.18 * k * (0.3 + contrast) * self.uniform(1, 1, 1)
        paper = paper + rough * self._texture((2, 4, 8, 16, 32), 3)
        paper = paper + rough * self.uniform(1, 1, 1, low=-0.6, high=0.6) * self._stripes()
        colour = colour + 0.5 * rough * self._texture((4, 16), 3)
        shadow = torch.roll(mask, (2, 2), dims=(2, 3)) * self.happens(0.2, 1, 1, 1) * self.uniform(1, 1, 1, high=0.5)
        image = torch.lerp(paper * (1 - shadow), colour, mask)
        for _ in range(2):
            image = self._covered(image)
        image = _blurred(image, self.uniform(1, high=1.3 * k * side / 64) + 0.25)
        image = image + self.normal(1, side, side) * 0.1 * k * self.uniform(1, 1, 1) ** 2
        image = image + self.normal(3, side, side) * 0.05 * k * self.uniform(1, 1, 1) ** 2
        return _blocks(image.clamp(0, 1), self.uniform(1, 1, low=0.3, high=4.0) * k).clamp(0, 1)

    def _printed(self, ink: Tensor) -> Tensor:
        """The ink of a line in view: the drawing, and two others of the batch beside it, or above and below."""
        others = (self.uniform(2) * self.n).long().clamp(max=self.n - 1)
        line = torch.cat((ink, ink[others[:, 0]], ink[others[:, 1]]), 1)
        line = _thickened(line, self.uniform(1, 1, 1, low=-0.7, high=0.7) * self.strength)
        grid = self._view()
        upright = self.happens(1 / 3, 1, 1)
        pitch = self.uniform(1, 1, low=1.75, high=2.1)
        step = (pitch * torch.cat((1 - upright, upright), 2)).unsqueeze(1)
        grids = torch.stack((grid, grid - step, grid + step), 1).flatten(0, 1)
        layers = F.grid_sample(line.flatten(0, 1).unsqueeze(1), grids, align_corners=False).view_as(line)
        shown = self.happens(0.7 * min(self.strength, 1.0), 2, 1, 1)
        return torch.cat((layers[:, :1], layers[:, 1:] * shown), 1).amax(1, keepdim=True)

    def _view(self) -> Tensor:
        """Where in the drawing each pixel looks, (B, S, S, 2): 12 degrees, sizes 0.72 to 1.12, a tenth of the side."""
        k, side = self.strength, self.side
        angle = self.uniform(low=-1) * math.radians(12) * k
        scale = 0.92 + 0.2 * self.uniform(low=-1) * min(k, 1.5)
        stretch = (self.uniform(low=-0.2, high=0.2) * k).exp()
        shear = self.uniform(low=-0.2, high=0.2) * k
        shift = self.uniform(2, low=-0.2, high=0.2) * k
        tilt = self.uniform(2, low=-0.18, high=0.18) * k
        cos, sin = angle.cos() / scale, angle.sin() / scale
        rows = (
            torch.stack((cos * stretch, (sin + shear * cos) * stretch, shift[:, 0]), 1),
            torch.stack((-sin / stretch, (cos - shear * sin) / stretch, shift[:, 1]), 1),
            torch.cat((tilt, torch.ones_like(tilt[:, :1])), 1),
        )
        y, x = torch.meshgrid(_line(side, self.device), _line(side, self.device), indexing="ij")
        points = torch.stack((x, y, torch.ones_like(x)), -1).view(1, -1, 3) @ torch.stack(rows, 2)
        grid = (points[..., :2] / points[..., 2:].clamp(min=0.2)).view(self.n, side, side, 2)
        warp = F.interpolate(self.normal(2, 5, 5), (side, side), mode="bicubic", align_corners=True)
        return grid + warp.permute(0, 2, 3, 1) * 0.05 * k * self.uniform(1, 1, 1)

    def _texture(self, cells: Sequence[int], channels: int) -> Tensor:
        """Smooth noise of several coarsenesses, the coarsest first, in random proportions; of about unit variance."""
        weights = self.uniform(len(cells), 1, 1, 1) ** 2 + 1e-3
        weights = weights * 1.5 / weights.square().sum(1, keepdim=True).sqrt()
        total = torch.zeros(self.n, channels, cells[0], cells[0], device=self.device)
        for number, (cell, finer) in enumerate(zip(cells, (*cells[1:], self.side), strict=True)):
            noise = self.normal(1, cell, cell)
            if channels > 1:
                noise = noise + 0.4 * self.normal(channels, cell, cell)
            total = F.interpolate(total + weights[:, number] * noise, (finer, finer), mode="bilinear")
        return total

    def _stripes(self) -> Tensor:
        """A grating of any direction and pitch, soft or hard, in half of the pictures: rulings, weave, screens."""
        angle, phase = self.uniform(1, 1, 1, high=math.pi), self.uniform(1, 1, 1, high=2 * math.pi)
        line = torch.arange(self.side, device=self.device) * 64 / self.side
        along = line.view(1, 1, 1, -1) * angle.cos() + line.view(1, 1, -1, 1) * angle.sin()
        wave = (along * (2 * math.pi / self.uniform(1, 1, 1, low=4, high=24)) + phase).sin()
        return (wave * self.uniform(1, 1, 1, low=1, high=6)).clamp(-1, 1) * self.happens(0.5, 1, 1, 1)

    def _covered(self, image: Tensor) -> Tensor:
        """A bar of any colour over the picture, up to a sixth of its side wide, in half of the pictures."""
        angle = self.uniform(1, 1, 1, high=math.pi)
        half = self.uniform(1, 1, 1, low=0.02, high=0.16 * self.strength + 0.02)
        length, centre = self.uniform(1, 1, 1, low=0.2, high=1.6), self.uniform(2, 1, 1, low=-0.9, high=0.9)
        line = _line(self.side, self.device)
        x, y = line.view(1, 1, 1, -1) - centre[:, :1], line.view(1, 1, -1, 1) - centre[:, 1:]
        across, along = (x * angle.cos() + y * angle.sin()).abs(), (y * angle.cos() - x * angle.sin()).abs()
        pixels = self.side / 2
        cover = ((half - across) * pixels).clamp(0, 1) * ((length * 0.5 - along) * pixels).clamp(0, 1)
        colour = self.uniform(1, 1, 1) + 0.1 * self.normal(3, 1, 1)
        return torch.lerp(image, colour, cover * self.happens(0.5, 1, 1, 1))


def _line(side: int, device: torch.device) -> Tensor:
    """The middles of the pixels of a line from -1 to 1, as grid_sample counts them."""
    return (torch.arange(side, device=device) + 0.5) * 2 / side - 1


def _thickened(ink: Tensor, weight: Tensor) -> Tensor:
    """Strokes a pixel wider on each side where ``weight`` is 1, thinner where it is -1, in between in between."""
    sign = torch.where(weight < 0, -1.0, 1.0)
    spread = F.pad(ink * sign, (1, 1, 1, 1), mode="replicate")
    spread = torch.maximum(torch.maximum(spread[..., :-2], spread[..., 2:]), spread[..., 1:-1])
    spread = torch.maximum(torch.maximum(spread[..., :-2, :], spread[..., 2:, :]), spread[..., 1:-1, :])
    return torch.lerp(ink, spread * sign, weight.abs())


def _blurred(image: Tensor, sigma: Tensor) -> Tensor:
    """A Gaussian blur of a width of its own, (B, 1) pixels, for each picture."""
    n, channels, side, _ = image.shape
    reach = max(1, 4 * side // 64)
    taps = torch.arange(-reach, reach + 1, device=image.device)
    kernel = (-0.5 * (taps / sigma).square()).exp()
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    flat = F.pad(image.reshape(1, n * channels, side, side), (reach,) * 4, mode="replicate")
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=n * channels)
    return F.conv2d(flat, kernel[:, None, :, None], groups=n * channels).view_as(image)


def _blocks(image: Tensor, coarseness: Tensor) -> Tensor:
    """The 8 x 8 cosine coefficients rounded to multiples of JPEG's table times ``coarseness``, (B, 1, 1)."""
    n, channels, side, _ = image.shape
    steps = torch.arange(8, device=image.device, dtype=torch.float32)
    basis = ((2 * steps + 1) * steps[:, None] * math.pi / 16).cos() / 2
    basis[0] /= math.sqrt(2)
    blocks = image.view(n, channels, side // 8, 8, side // 8, 8).transpose(3, 4)
    table = torch.tensor(_JPEG, device=image.device) * coarseness.view(n, 1, 1, 1, 1, 1) / 255 + 1e-6
    waves = ((basis @ blocks @ basis.T) / table).round() * table
    return (basis.T @ waves @ basis).transpose(3, 4).reshape_as(image)
