"""How far the loss and the weights of a run can follow soft thresholds and their pressure, layer by layer.

A soft threshold takes T from every weight, and counts on training to give it back. Where the optimizer cannot move the
weights that far, as in fine-tuning at a small learning rate, it takes less::

    W^ = sign(W) (|W| - soft T)  for |W| > T, else 0
    soft = shrink where a normalisation stands to give the scale back, else 0
    shrink = min(1, (reach / FREE)^2),   reach = steps * (largest mean |step| of a layer's weights) / (their first size)

from the soft threshold (1: training from scratch) to the hard one (0). Without a normalisation, as in an LSTM, what a
soft threshold takes does not come back at all; with no target it is soft all the same, as in the paper. Nor can the
loss hold against the pressure then: the pressure rests where the density is below ``goal^shrink curve^(1 - shrink)``,
and with no target it is ``shrink`` of the method's own.

The loss answers the pressure through the optimizer's steps of s. SGD's are as large as the sum of gradients that they
follow; those of Adam are the learning rate, whatever the gradient, and those of a warm-up are small. While they are
less than the pressure's, as they are for as long as a network has not begun to learn, nothing holds against it, and the
density would be at the goal before the weights have learned anything, from which a network hardly recovers. So the
exponent above is ``min(shrink, answer)``,
``answer = (largest |step of s| by the optimizer so far) / (largest by the pressure)``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rarefy.sparse.buckets import Bucket
from rarefy.sparse.budget import Budget

#: How many times its own size the run must be able to move a layer's weights for the whole soft threshold. Training
#: from scratch has 3 to 60, AdamW at 1e-4 over 500 steps 0.3, SGD with momentum at 0.01 up to 1.5.
FREE = 2.0


def is_restored(model: nn.Module, key: str) -> bool:
    """Tell whether the network gives back the scale that a soft threshold takes from a parameter: by a normalisation.

    The gates of recurrent layers have none, whatever stands around them.
    """
    owner = model.get_submodule(key.rpartition(".")[0])
    if isinstance(owner, (nn.RNNBase, nn.RNNCellBase)):
        return False
    return any("Norm" in type(module).__name__ for module in model.modules())


def see_step(bucket: Bucket, now: Tensor) -> None:
    """See how far the step to these weights, (N,), has moved those of each layer."""
    kept = bucket.kept
    step = bucket.means((now - kept["latent"]).float().abs())
    # NaN and inf leave it as it is.
    kept["moved"].copy_(torch.where(step.isfinite(), torch.maximum(kept["moved"], step), kept["moved"]))


def see_reach(bucket: Bucket, steps: int) -> None:
    """Set shrink and soft by how far so many such steps reach."""
    kept = bucket.kept
    reach = kept["moved"] * steps / kept["scale"].clamp(min=1e-30)
    kept["shrink"].copy_((reach / FREE).square().clamp(max=1.0))
    kept["soft"].copy_(kept["shrink"] * kept["restored"])


def see_answer(bucket: Bucket, decay: float) -> None:
    """See how far the optimizer has moved each s, as a share of what the pressure, this decay, does at its greatest."""
    kept, s = bucket.kept, bucket.own["s"].detach()
    answer = (s - kept["previous"]).abs() / (decay * s.abs()).clamp(min=1e-30)
    kept["answered"].copy_(torch.fmax(kept["answered"], answer.clamp(max=1.0)))  # NaN leaves it as it is


def share(bucket: Bucket) -> Tensor:
    """Of each layer, how well loss and weights follow the pressure, in [0, 1]: the exponent above, (L,)."""
    answered = torch.stack([part.mean() for part in bucket.parts(bucket.kept["answered"])])
    return torch.minimum(bucket.kept["shrink"], answered)


def resting_density(budget: Budget, progress: float, share: float) -> float:
    """The density at which the pressure rests: the goal, and the curve to it where loss or weights are too slow."""
    return float(budget.goal**share * budget.aim(progress) ** (1.0 - share))
