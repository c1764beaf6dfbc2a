"""Layers without state, whose ``forward`` the library ``kernels`` puts in the place of another's; with gradients."""

from torch import Tensor, nn

from . import act


class SiLU(nn.Module):
    """x * sigmoid(x)."""

    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        """Take any shape and return the same."""
        return act.silu(input)


class GeLU(nn.Module):
    """x Phi(x)."""

    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        """Take any shape and return the same."""
        return act.gelu(input)


class GeluTanh(nn.Module):
    """GELU by tanh."""

    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        """Take any shape and return the same."""
        return act.gelu(input, approximate="tanh")


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x)."""

    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        """Take any shape and return the same."""
        return act.quick_gelu(input)


class SiluAndMul(nn.Module):
    """silu(gate) * up of [gate | up]."""

    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        """Take [..., 2 d] and return [..., d]."""
        return act.silu_and_mul(x)


class MulAndSilu(nn.Module):
    """up * silu(gate) of [up | gate]."""

    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        """Take [..., 2 d] and return [..., d]."""
        up, gate = x.chunk(2, -1)
        return act.silu_and_mul(gate, up)


class GeluAndMul(nn.Module):
    """gelu(gate) * up of [gate | up]."""

    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        """Take [..., 2 d] and return [..., d]."""
        return act.gelu_and_mul(x)


class GeluTanhAndMul(nn.Module):
    """GELU by tanh of the gate, times up, of [gate | up]."""

    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        """Take [..., 2 d] and return [..., d]."""
        return act.gelu_tanh_and_mul(x)


NewGELU = FastGELU = GeluTanh  # other writings of the same function
Silu, Gelu = SiLU, GeLU  # the names of kernels-community/activation
