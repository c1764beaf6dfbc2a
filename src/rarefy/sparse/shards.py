"""Parameters that several processes hold together (FSDP2): which part is here, and sums over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Shard:
    """A process's part of a parameter that is split along its first dimension.

    Attributes:
        group: the processes that hold the parts, in the order of the rows.
        first_row: the first row that lies here.
        rows: how many lie in each part, but for the last, and those after it that are empty.
    """

    group: ProcessGroup
    first_row: int
    rows: int

    def __deepcopy__(self, memo: Any) -> Shard:
        return self  # a process group cannot be copied


def shard_of(name: str, parameter: nn.Parameter) -> Shard | None:
    """The part of a parameter that is here, or None where all of it is. Raises ValueError for other splits."""
    if not hasattr(parameter, "_local_tensor"):
        return None
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import Shard as Split
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    tensor: DTensor = parameter  # type: ignore[assignment]
    mesh, placements = tensor.device_mesh, tensor.placements
    if all(isinstance(placement, Replicate) for placement in placements):
        return None
    split = [dim for dim, placement in enumerate(placements) if type(placement) is Split and placement.dim == 0]
    if len(split) != 1 or not all(isinstance(p, Replicate) for d, p in enumerate(placements) if d != split[0]):
        raise ValueError(
            f"layer {name!r} is split as {placements}; a sparsifier takes parameters split along their first dimension "
            "over one dimension of the mesh, as fully_shard does (with or without replicas)"
        )
    _, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    return Shard(mesh.get_group(split[0]), offset[0], -(-tensor.shape[0] // mesh.size(split[0])))


def shared_group(shards: Sequence[Shard | None]) -> ProcessGroup | None:
    """The processes that hold the layers together; None where every layer is whole here."""
    groups = {shard.group for shard in shards if shard is not None}
    if len(groups) > 1:
        raise ValueError("the layers are sharded over different groups of processes; shard all of them over one mesh")
    return next(iter(groups), None)


def total(values: Tensor, shards: Sequence[Shard | None]) -> Tensor:
    """(L, ...): what each process found for its part of each layer, summed over the parts; whole layers stay."""
    group = shared_group(shards)
    if group is None:
        return values
    split = torch.tensor([shard is not None for shard in shards], device=values.device)
    split = split.view(-1, *[1] * (values.dim() - 1))
    summed = torch.where(split, values, 0)
    torch.distributed.all_reduce(summed, group=group)
    return torch.where(split, summed, values)


def reshard(model: nn.Module) -> None:
    """Let ``fully_shard`` drop what it has gathered for a forward: the model's parameters are the shards from here on.

    What a forward without a backward has gathered would stay in use, whatever is written to the shards.
    """
    for module in model.modules():
        if hasattr(module, "set_reshard_after_backward"):  # an FSDPModule
            module.reshard()  # type: ignore[operator]


def like(local: Tensor, parameter: Any) -> Tensor:
    """A local tensor as a distributed one, split as the parameter is; itself where that is not split."""
    if not hasattr(parameter, "_local_tensor"):
        return local
    from torch.distributed.tensor import DTensor

    shape = torch.Size([parameter.shape[0], *local.shape[1:]])
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )
