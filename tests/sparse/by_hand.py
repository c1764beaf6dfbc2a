"""One small layer under a method, for cases that are computed by hand."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rarefy import sparse


class ByHand:
    """A linear layer without bias, its sparsifier and plain SGD, and what the optimizer is given in its steps.

    The used weights are the parameter's own values; the dense ones and their gradient are what the optimizer finds.
    """

    def __init__(
        self,
        method: str,
        weight: Tensor | Sequence[Sequence[float]],
        *,
        lr: float = 0.0,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        **options,
    ) -> None:
        weight = torch.as_tensor(weight)
        self.model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
        with torch.no_grad():
            self.model[0].weight.copy_(weight)
        self.sparsifier = sparse.create(method, self.model, **{"total_steps": 10, **options})
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay
        )
        self.sparsifier.attach(self.optimizer)
        # Hooks run in the order they were registered: this one sees what the optimizer is about to see.
        self.optimizer.register_step_pre_hook(self._record)

    def _record(self, *_) -> None:
        weight = self.model[0].weight
        self.dense = weight.detach().clone()
        self.gradient = None if weight.grad is None else weight.grad.clone()

    @property
    def used(self) -> list[float]:
        """The weights used, of the first output."""
        return self.model[0].weight[0].tolist()

    @property
    def state(self):
        """The only layer's, as reported."""
        return self.sparsifier.layers()[0]

    @property
    def mask(self) -> Tensor:
        """A copy of the layer's mask."""
        return self.sparsifier.live_masks()["0"].clone()

    def kept(self, name: str) -> Tensor:
        """What the method keeps under this name."""
        return self.sparsifier.state_dict()["layers"]["0"][name]

    def put(self, name: str, value) -> None:
        """Let the method keep this value instead, and have kept it a step ago too."""
        state = self.sparsifier.state_dict()
        kept = state["layers"]["0"]
        kept[name].copy_(torch.as_tensor(value))
        if name.startswith("own.") and "previous" in kept:
            kept["previous"].copy_(kept[name])
        self.sparsifier.load_state_dict(state)

    def backward(self, inputs: Tensor | None = None) -> None:
        """The gradient of the outputs' sum; with inputs of 1 that of every used weight is 1."""
        self.optimizer.zero_grad()
        inputs = torch.ones(1, self.model[0].in_features) if inputs is None else inputs
        self.model(inputs).sum().backward()

    def step(self, inputs: Tensor | None = None) -> list[float]:
        """A step under the loss of :meth:`backward`; gives dL/dW of the first output."""
        self.backward(inputs)
        self.optimizer.step()
        return self.gradient[0].tolist()

    def rest(self, steps: int = 1) -> "ByHand":
        """Steps without a gradient, which leave the weights where they are."""
        self.optimizer.zero_grad()
        for _ in range(steps):
            self.optimizer.step()
        return self
