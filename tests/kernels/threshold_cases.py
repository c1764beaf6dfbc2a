"""Layers of every kind for the tests of thresholds, here, in Triton's interpreter and on a GPU."""

import torch

from rarefy.kernels.thresholds import ThresholdedLayers, mask_

SHAPES = [(1,), (9,), (341,), (4097,), (2, 70_001), (9, 41), (5, 3, 3, 3), (3, 1, 2, 2), (4, 3, 2, 2, 2), (0, 4), ()]
KINDS = [
    *("float32", "rows", "channels_last", "odd gradients", "missing gradients", "unbounded", "transposed", "large"),
    *("transposed rows", "strided", "bfloat16", "float16", "float64", "mixed"),
]


class Case:
    """Some layers, what a step takes of them, and the step."""

    def __init__(self, kind="float32", shapes=SHAPES, rows=None, alpha=None, shrink=None, bounded=None, seed=0):
        generator = torch.Generator().manual_seed(seed)
        dtype = getattr(torch, kind) if kind in ("bfloat16", "float16", "float64") else torch.float32
        if kind == "large":
            shapes = [(3, 400_001), (64, 999), (1, 700_003)]
        if "transposed" in kind:
            shapes = [(9, 41), (7, 3), (1, 5)]
        if kind == "strided":
            shapes = [(9, 41), (7, 3)]
        self.kind, self.device = kind, "cpu"
        several = kind not in ("transposed", "strided") if rows is None else rows
        self.rows = [shape[0] if several and shape and index % 2 == 0 else 1 for index, shape in enumerate(shapes)]
        self.bounded = kind != "unbounded" if bounded is None else bounded

        def values(shape, special):
            made = torch.randn(tuple(shape), generator=generator).to(dtype)
            flat = made.view(-1)
            numbers = torch.tensor(special, dtype=dtype)[: len(flat) // 3]
            flat[torch.randperm(len(flat), generator=generator)[: len(numbers)]] = numbers
            return made

        self.dense = [self.laid(values(shape, [0.0, -0.0, 1e-42, -3e-42])) for shape in shapes]
        self.grads = [self.laid(values(shape, [0.0, -0.0, 1e-41, -1e-41])) for shape in shapes]
        if kind == "mixed":
            self.dense[1], self.grads[1] = self.dense[1].bfloat16(), self.grads[1].bfloat16()
        if kind == "odd gradients":
            self.grads = [
                grad.transpose(0, -1).contiguous().transpose(0, -1) if grad.dim() else grad for grad in self.grads
            ]
        if kind == "missing gradients":
            self.grads[1::3] = [None] * len(self.grads[1::3])
        self.masks = [torch.rand(w.shape, generator=generator) < 0.5 for w in self.dense]
        self.masks = [
            torch.empty_like(w, dtype=torch.bool).copy_(m) for w, m in zip(self.dense, self.masks, strict=True)
        ]
        count = len(shapes)
        self.thresholds = torch.rand(sum(self.rows), generator=generator)
        self.alpha = torch.rand(count, generator=generator) if alpha is None else torch.full((count,), alpha)
        self.shrink = torch.rand(count, generator=generator) if shrink is None else torch.full((count,), shrink)

    def laid(self, tensor):
        """The tensor in the memory layout of this kind."""
        if self.kind == "channels_last" and tensor.dim() in (4, 5):
            return tensor.to(memory_format=torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d)
        if "transposed" in self.kind:
            return tensor.t().contiguous().t()
        if self.kind == "strided":
            return torch.stack([tensor, tensor], -1)[..., 0]
        return tensor

    def to(self, device):
        """This case with everything on another device; the layouts stay."""
        self.device = device
        self.dense, self.masks = [w.to(device) for w in self.dense], [m.to(device) for m in self.masks]
        self.grads = [grad if grad is None else grad.to(device) for grad in self.grads]
        self.thresholds, self.alpha, self.shrink = (
            tensor.to(device) for tensor in (self.thresholds, self.alpha, self.shrink)
        )
        return self

    def copies(self, tensors):
        """Clones, with non-dense ones still not dense."""
        return [tensor if tensor is None else self.laid(tensor.clone()) for tensor in tensors]

    def run(self):
        """A step and masks, on copies; what each part of it left, on the CPU."""
        layers = ThresholdedLayers(self.copies(self.dense), self.copies(self.dense), self.rows)
        for latent in layers.latents:
            latent.fill_(7.0)
        layers.after(self.thresholds, self.shrink)
        used = [weight.clone() for weight in layers.weights]
        live = layers.count(self.thresholds)
        grads = [grad if grad is None else grad.clone() for grad in self.grads]
        lower = self.thresholds / 3 if self.bounded else None
        sums = layers.before(grads, self.thresholds, self.alpha, lower)
        masked = self.copies(self.dense)
        mask_(masked, self.masks)
        found = {
            "used": used,
            "latents": list(layers.latents),
            "live": [live],
            "grads": [grad for grad in grads if grad is not None],
            "weights": list(layers.weights),
            "masked": masked,
            "sums": [sums],
        }
        return {name: [tensor.cpu() for tensor in tensors] for name, tensors in found.items()}

    def same(self, got, expected):
        """Assert the same bits, but for dL/dT: that within 1e-6 of the sum of what was added."""
        for name in expected:
            if name == "sums":
                continue
            for index, (a, b) in enumerate(zip(got[name], expected[name], strict=True)):
                assert (a.dtype, a.shape) == (b.dtype, b.shape), (name, index)
                assert torch.equal(_bits(a), _bits(b)), (name, index)
        grads, sizes = iter(expected["grads"]), []
        for grad, rows in zip(self.grads, self.rows, strict=True):
            given = torch.zeros(rows) if grad is None else next(grads)
            sizes.append(given.double().abs().sum_to_size((rows, *(1,) * (given.dim() - 1)) if given.dim() else ()))
        error = (got["sums"][0].double() - expected["sums"][0].double()).abs()
        assert (error <= 1e-6 * torch.cat([torch.zeros(0), *(size.reshape(-1) for size in sizes)])).all(), error.max()


def _bits(tensor):
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()]
    return tensor.contiguous().view(integer)
