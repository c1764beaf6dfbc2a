"""Training by two processes: shards (FSDP2) give what replicas (DDP) give, and what is chosen over shards is exact."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from rarefy import sparse
from rarefy.sparse import masks
from rarefy.sparse.shards import shard_of
from tests.sparse.methods import CASES, batch, create, network

pytestmark = pytest.mark.slow

STEPS = 30


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(case, rank, sharded):
    """The weights after a few steps, of the whole model, and how sparse the sparsifier says it is."""
    torch.manual_seed(1)
    model = network(norm=False)
    sparsifier = create(case, model, total_steps=STEPS)
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    forward = model if sharded else nn.parallel.DistributedDataParallel(model)
    sparsifier.attach(optimizer)
    for step in range(STEPS):
        images, labels = batch(2 * step + rank)
        optimizer.zero_grad()
        F.cross_entropy(forward(images), labels).backward()
        optimizer.step()
    sparsity = sparsifier.sparsity()
    sparsifier.finalize()
    return {name: whole(p) for name, p in model.named_parameters()}, sparsity


def choices(rank):
    """What is chosen over parts of layers, with ties and uneven rows, and over the whole of them."""
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 7), (1, 3), (8, 4, 3))
    layers = [torch.randn(shape, generator=generator).mul(3).round() for shape in shapes]
    parts = [distribute_tensor(layer, mesh, [Shard(0)]) for layer in layers]
    local, shards = [part.to_local() for part in parts], [shard_of("x", part) for part in parts]

    def gathered(some):
        return [whole(DTensor.from_local(m, mesh, [Shard(0)], run_check=False, shape=part.shape, stride=part.stride()))
                for m, part in zip(some, parts, strict=True)]  # fmt: skip

    there = gathered(masks.within_budget(local, [1.0, 49.0, 3.5], 150.0, [1, 1, 2], shards))
    return there, masks.within_budget(layers, [1.0, 49.0, 3.5], 150.0, [1, 1, 2])


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {case: [train(case, rank, sharded) for sharded in (False, True)] for case in CASES}
    chosen = choices(rank)
    other = nn.Linear(8, 8, bias=False)
    fully_shard(other, mesh=init_device_mesh("cpu", (2,)), shard_placement_fn=lambda _: Shard(1))
    try:
        sparse.create("gmp", other, target=0.5, total_steps=20)
        refused = ""
    except ValueError as error:
        refused = str(error)
    torch.save((found, chosen, refused), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # the end of the interpreter may abort (pytorch/pytorch#190489)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_shards_train_as_replicas_do(both, case):
    (replicas, sparsity), (shards, sharded_sparsity) = both[0][0][case]
    assert sharded_sparsity == pytest.approx(sparsity, abs=2e-3)
    for name, value in replicas.items():
        torch.testing.assert_close(shards[name], value, rtol=1e-3, atol=1e-4, msg=name)
    for weights in (0, 1):
        for name, value in both[0][0][case][weights][0].items():
            assert torch.equal(value, both[1][0][case][weights][0][name]), name


def test_choices_over_parts_are_those_over_the_whole(both):
    there, here = both[0][1]
    for a, b in zip(there, here, strict=True):
        assert torch.equal(a, b)


def test_other_splits_are_refused(both):
    assert "split along their first dimension" in both[0][2]
