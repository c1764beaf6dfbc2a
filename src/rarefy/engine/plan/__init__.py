"""The plan: a network as typed steps in the order in which they run, with nothing left of modules and of training.

A *value* is a tensor that a step makes or that is an input; it has a name. Dimension 0 is the batch, dimension 1 the
channels, as in PyTorch. Weights are part of the step that uses them.

Steps are here by kind: those with weights in ``layers``, what is computed number by number or over windows and axes in
``arithmetic``, what moves numbers in ``moving``, what is told where each number lies in ``places``; and in
``plan``, beside the plan itself, the operators that PyTorch runs.
"""

from rarefy.engine.plan.arithmetic import (
    MOST_INSTRUCTIONS,
    MOST_TERMS,
    OF_ONE,
    OF_TWO,
    REDUCTIONS,
    Affine,
    Binary,
    Dequantize,
    GlobalAverage,
    Pointwise,
    Pool,
    Quantize,
    Reduce,
    Reduction,
    Table,
)
from rarefy.engine.plan.base import (
    ACTIVATIONS,
    MODED,
    Activation,
    Quantized,
    Step,
    Value,
    parts,
    tensors,
)
from rarefy.engine.plan.layers import (
    Conv,
    ConvTranspose,
    Embedding,
    GroupNorm,
    GRUGates,
    Layer,
    Linear,
    LSTMCell,
    LSTMHidden,
    Norm,
    Recurrence,
)
from rarefy.engine.plan.moving import (
    Concat,
    Flatten,
    Join,
    Resize,
    Upsample,
    View,
)
from rarefy.engine.plan.places import (
    Attention,
    MatMul,
    Placed,
    Places,
    Softmax,
)
from rarefy.engine.plan.plan import (
    INT8,
    NATIVE,
    Operator,
    Plan,
    Ref,
    last_uses,
    refs,
)

__all__ = [
    "ACTIVATIONS",
    "INT8",
    "MODED",
    "MOST_INSTRUCTIONS",
    "MOST_TERMS",
    "NATIVE",
    "OF_ONE",
    "OF_TWO",
    "REDUCTIONS",
    "Activation",
    "Affine",
    "Attention",
    "Binary",
    "Concat",
    "Conv",
    "ConvTranspose",
    "Dequantize",
    "Embedding",
    "Flatten",
    "GRUGates",
    "GlobalAverage",
    "GroupNorm",
    "Join",
    "LSTMCell",
    "LSTMHidden",
    "Layer",
    "Linear",
    "MatMul",
    "Norm",
    "Operator",
    "Placed",
    "Places",
    "Plan",
    "Pointwise",
    "Pool",
    "Quantize",
    "Quantized",
    "Recurrence",
    "Reduce",
    "Reduction",
    "Ref",
    "Resize",
    "Softmax",
    "Step",
    "Table",
    "Upsample",
    "Value",
    "View",
    "last_uses",
    "parts",
    "refs",
    "tensors",
]
