"""``nn.Transformer`` and its parts, traced as they compute without gradient.

An encoder that is given a padding mask goes over nested tensors: samples without their padding, where that is at the
end, and with zeros in its place afterwards. Those have no graph, so that a trace has the padded tensors, and other
numbers where they are padded. A mask's numbers are read to see whether it is causal, which a trace cannot do.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules import transformer

_TRACING = threading.RLock()


@contextmanager
def traceable_transformers() -> Iterator[None]:
    """Within the block, this thread traces zeros where nested tensors have them, and masks without reading them."""
    with _TRACING:
        forward, detect = nn.TransformerEncoder.forward, transformer._detect_is_causal_mask
        thread = threading.get_ident()

        def encoded(
            self: nn.TransformerEncoder,
            src: Tensor,
            mask: Tensor | None = None,
            src_key_padding_mask: Tensor | None = None,
            is_causal: bool | None = None,
        ) -> Tensor:
            nested = threading.get_ident() == thread and mask is None and _is_nested(self, src)
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

        def causal(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
            # That a mask is causal is but a hint: without it the mask is added, and the numbers are the same.
            return is_causal is True if threading.get_ident() == thread else detect(mask, is_causal, size)

        nn.TransformerEncoder.forward = encoded  # type: ignore[method-assign]
        transformer._detect_is_causal_mask = causal
        try:
            yield
        finally:
            nn.TransformerEncoder.forward = forward  # type: ignore[method-assign]
            transformer._detect_is_causal_mask = detect


def _is_nested(encoder: nn.TransformerEncoder, src: Tensor) -> bool:
    """Whether an encoder goes over nested tensors where it is given a padding mask alone, in evaluation mode."""
    wanted = torch.backends.mha.get_fastpath_enabled() and getattr(encoder, "use_nested_tensor", False)
    return wanted and src.dim() == 3 and not encoder.layers[0].training and not torch.is_autocast_enabled()
