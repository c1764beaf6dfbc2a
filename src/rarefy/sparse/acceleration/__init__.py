"""Training steps that take less time where a layer is sparse: native kernels in place of PyTorch's dense products.

A layer has three products in a step: the output, y = W x, the gradient of the input, W^T dy, and that of the weight,
dy x^T. Each of them is computed by whichever is faster here, PyTorch's function or a kernel that passes over the zeros
(:mod:`rarefy.kernels.sparse_layers`); both are timed on the layer's own tensors when the layer has become sparse enough
for the question to be open. The weight's gradient is sparse while the method reads no gradient of a masked weight.

    interception   a call of a layer comes in here,
    places         where its weights live is known,
    products       it is computed,
    choices        by the function that was measured to be the faster
"""

from rarefy.sparse.acceleration.choices import Choice
from rarefy.sparse.acceleration.handle import Acceleration, accelerate

__all__ = ["Acceleration", "Choice", "accelerate"]
