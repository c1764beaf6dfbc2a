"""Models whose parameters several processes hold together (FSDP2), and states that are whole whoever holds parts."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def shard(model: nn.Module, device: torch.device) -> None:
    """Split the parameters of a model over all processes, each along its first dimension.

    They are gathered block by block in forward and backward passes: a block is a member of a ModuleList or Sequential
    that has modules of its own. What lies outside of blocks, or is used in several places, is gathered once.

    Raises ValueError for a parameter without a dimension, which cannot be split.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    scalars = [name for name, parameter in model.named_parameters() if parameter.dim() == 0]
    if scalars:
        raise ValueError(
            f"shard: true splits parameters along their first dimension, and {scalars[0]!r} has none: give it the "
            "shape (1,), or train with shard: false"
        )
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    owners = [module for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    members = {id(member) for owner in owners for member in owner if next(member.children(), None) is not None}
    uses = _uses(model)
    blocks = [
        module
        for module in model.modules()
        if id(module) in members and all(uses[parameter] == count for parameter, count in _uses(module).items())
    ]
    for module in reversed(blocks):  # those inside come first
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # Of the whole model's output alone, which a loss does not change in place.
    warnings.filterwarnings("ignore", rf"FSDP2-wrapped module \({type(model).__name__}\) returned a view", UserWarning)


def _uses(module: nn.Module) -> Counter[nn.Parameter]:
    """In how many places of a module each of its parameters stands."""
    return Counter(parameter for _, parameter in module.named_parameters(remove_duplicate=False))


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which this process may hold a part; all processes must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def snapshot(state: Any, keep: bool) -> Any:
    """A copy of a state that nothing changes any more: its tensors whole, on the CPU, in memory of their own.

    All processes must ask; those that do not ``keep`` it get one without tensors.
    """
    if isinstance(state, Tensor):
        entire = whole(state.detach())
        return entire.to("cpu", copy=True) if keep else None
    if isinstance(state, Mapping):
        return {key: snapshot(value, keep) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(snapshot(value, keep) for value in state)
    return state


def part(tensor: Tensor, like: Any) -> Tensor:
    """Of a whole tensor the part that this process holds of ``like``, as that is split; itself where it is not."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # Without a source, every process takes its part of what it has.
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def load_model(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load whole tensors into a model that may be split."""
    own = model.state_dict()
    model.load_state_dict({key: part(tensor, own.get(key)) for key, tensor in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load whole tensors into an optimizer whose parameters may be split.

    Raises ValueError for tensors of another shape than their parameter's, which the next step would stumble over.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def parts(parameter: Tensor, kept: Mapping[str, Any]) -> dict[str, Any]:
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                shapes = f"{list(value.shape)}, and its parameter {list(parameter.shape)}"
                raise ValueError(f"the optimizer's {name} has the shape {shapes}")
        alike = (isinstance(value, Tensor) and value.shape == parameter.shape for value in kept.values())
        return {
            name: part(value, parameter) if split else value
            for (name, value), split in zip(kept.items(), alike, strict=True)
        }

    optimizer.load_state_dict(
        {**state, "state": {index: parts(parameters[index], kept) for index, kept in state["state"].items()}}
    )
