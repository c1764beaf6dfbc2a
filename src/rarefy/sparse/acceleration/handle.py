"""A sparsifier's acceleration: its beginning, what it saved, and its end."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from rarefy.kernels import sparse_layers
from rarefy.sparse.acceleration import interception
from rarefy.sparse.acceleration.choices import Choice
from rarefy.sparse.acceleration.places import AcceleratedLayer
from rarefy.sparse.base import Sparsifier
from rarefy.sparse.families.masked import Masked
from rarefy.sparse.layers import Layer


class Acceleration:
    """What :func:`accelerate` did, and the way back."""

    def __init__(self, sparsifier: Sparsifier) -> None:
        self._sparsifier = sparsifier
        self._layers = [AcceleratedLayer(layer, self) for layer in sparsifier._layers]
        self._masks: tuple[int, object, dict[int, Tensor]] = (-1, None, {})

    @property
    def active(self) -> bool:
        """Whether it is in force."""
        return bool(self._layers)

    def choices(self) -> list[Choice]:
        """Return what was timed so far, in the order of the layers."""
        return [choice for choice in self._all() if choice.seconds_dense > 0.0]

    @property
    def seconds_saved(self) -> float:
        """What PyTorch's functions would have taken longer for all sparse products, less what the indices took."""
        return sum(choice.seconds_saved for choice in self._all()) - sum(layer.spent for layer in self._layers)

    def _all(self) -> Iterator[Choice]:
        for layer in self._layers:
            for choices in layer.choices.values():
                yield from choices.values()

    def restore(self) -> None:
        """Let PyTorch compute everything again."""
        interception.let_go(self._layers)
        self._layers = []
        if self._sparsifier._acceleration is self:
            self._sparsifier._acceleration = None

    def mask_of(self, layer: Layer) -> Tensor | None:
        """The mask of hard masks, of which a live weight may be 0; None where a weight lives that is not 0."""
        sparsifier = self._sparsifier
        if not isinstance(sparsifier, Masked) or sparsifier.finalized or not sparsifier._buckets:
            return None
        step, buckets, masks = self._masks
        if step != sparsifier.steps or buckets is not sparsifier._buckets:
            rows = zip(sparsifier._layers, sparsifier.kept("mask"), strict=True)
            masks = {id(layer): mask for layer, mask in rows}
            self._masks = (sparsifier.steps, sparsifier._buckets, masks)
        return masks.get(id(layer))

    def dense_gradients(self) -> bool:
        """Whether the step reads gradients of masked weights."""
        return self._sparsifier.finalized or self._sparsifier.reads_masked_gradients()


def accelerate(sparsifier: Sparsifier) -> Acceleration:
    """Compute the products of a sparsifier's linear layers and convolutions on sparse kernels where these are faster.

    ::

        sparsifier.attach(optimizer)
        acceleration = sparse.accelerate(sparsifier)
        ...                                      # the training loop, as it is
        print(acceleration.seconds_saved)
        acceleration.restore()

    For float32 on the CPU, in ``nn.Linear`` and ``nn.Conv2d`` and what derives from them (groups=1, zeros as padding).
    Everything else is PyTorch's, and so is every call under autocast, ``torch.compile``, a mode of PyTorch,
    forward-mode differentiation or a transform of ``torch.func``, and what second derivatives need. The model stays as
    it is: copies, pickles and checkpoints of it know of nothing. While one is in force, ``nn.Linear.forward`` and
    ``nn.Conv2d._conv_forward`` look their weight up.

    Results are PyTorch's up to the rounding of sums in float32. Which function is faster is measured, so two runs may
    round differently. While a method reads no gradient of a masked weight, ``grad`` holds 0 there: a norm of gradients
    that is taken before the step, as clipping does, is over the live weights alone.

    Raises:
        TypeError: for what is no sparsifier.
        RuntimeError: without the native library.
    """
    if not isinstance(sparsifier, Sparsifier):
        raise TypeError(f"accelerate() takes a sparsifier, got {type(sparsifier).__name__}: accelerate(sparsifier)")
    if not sparse_layers.lanes():
        raise RuntimeError("accelerate() needs rarefy's native library, which is not here: `rarefy info` says why")
    if sparsifier._acceleration is not None:
        sparsifier._acceleration.restore()
    acceleration = sparsifier._acceleration = Acceleration(sparsifier)
    interception.intercept(acceleration._layers)
    return acceleration
