"""``nn.TransformerEncoder`` with a padding mask, traced as it computes without gradient.

Then it goes over nested tensors: samples without their padding, where that is at the end, and with zeros in its place
afterwards. Those have no graph, so that a trace has the padded tensors, and other numbers where they are padded.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_TRACING = threading.RLock()


@contextmanager
def padded_encoders() -> Iterator[None]:
    """Within the block, encoders that this thread traces put zeros where PyTorch's nested tensors would."""
    with _TRACING:
        forward, tracing = nn.TransformerEncoder.forward, threading.get_ident()

        def traced(
            self: nn.TransformerEncoder,
            src: Tensor,
            mask: Tensor | None = None,
            src_key_padding_mask: Tensor | None = None,
            is_causal: bool | None = None,
        ) -> Tensor:
            nested = threading.get_ident() == tracing and mask is None and _is_nested(self, src)
            if src_key_padding_mask is None or not nested:
                return forward(self, src, mask, src_key_padding_mask, is_causal)
            padded = src_key_padding_mask if src_key_padding_mask.dtype is torch.bool else src_key_padding_mask != 0
            if getattr(self, "mask_check", True):  # where one sample has its padding elsewhere, none is nested
                padded = padded & (padded[:, 1:] | ~padded[:, :-1]).all()
            if src_key_padding_mask.is_floating_point():  # whatever it adds there, nested tensors have nothing
                src_key_padding_mask = src_key_padding_mask.masked_fill(padded, float("-inf"))
            plain = copy.copy(self)
            plain.__dict__ |= {"use_nested_tensor": False, "_modules": {**self._modules, "norm": None}}
            output = forward(plain, src, None, src_key_padding_mask, is_causal).masked_fill(padded[..., None], 0.0)
            return output if self.norm is None else self.norm(output)

        nn.TransformerEncoder.forward = traced  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.TransformerEncoder.forward = forward  # type: ignore[method-assign]


def _is_nested(encoder: nn.TransformerEncoder, src: Tensor) -> bool:
    """Whether an encoder goes over nested tensors where it is given a padding mask alone, in evaluation mode."""
    wanted = torch.backends.mha.get_fastpath_enabled() and getattr(encoder, "use_nested_tensor", False)
    return wanted and src.dim() == 3 and not encoder.layers[0].training and not torch.is_autocast_enabled()
