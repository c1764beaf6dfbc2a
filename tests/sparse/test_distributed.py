"""Training by two processes: shards (FSDP2) give what replicas (DDP) give, and what is chosen over shards is exact."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from rarefy import sparse
from rarefy._prices import Prices
from rarefy.sparse import masks
from rarefy.sparse.shards import shard_of
from tests.apart import apart
from tests.sparse.methods import CASES, assert_equal, batch, create, network

pytestmark = [
    pytest.mark.slow,
    # What torch.distributed.checkpoint says of one process.
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"),
]

STEPS = 10


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class Run:
    """A model that one process holds, or two by replicas or shards; each trains on a half of the examples."""

    def __init__(self, case, kind):
        torch.manual_seed(1)
        self.model = self.forward = network(norm=False)
        self.sparsifier = create(case, self.model, total_steps=STEPS)
        if kind == "shards":
            fully_shard(self.model, mesh=init_device_mesh("cpu", (2,)))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        if kind == "replicas":
            self.forward = nn.parallel.DistributedDataParallel(self.model)
        self.parts = [0, 1] if kind == "one" else [dist.get_rank()]
        self.sparsifier.attach(self.optimizer)

    def train(self, steps):
        for step in steps:
            halves = [batch(2 * step + part) for part in self.parts]
            images, labels = (torch.cat(some) for some in zip(*halves, strict=True))
            self.optimizer.zero_grad()
            F.cross_entropy(self.forward(images), labels).backward()
            self.optimizer.step()
        return self

    def checkpoint(self):
        """What torch.distributed.checkpoint saves, and loads into."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "sparsifier": self.sparsifier.state_dict()}

    def load(self, folder):
        state = self.checkpoint()
        dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.sparsifier.load_state_dict(state["sparsifier"])
        return self

    def end(self):
        """The weights of the whole model, and how sparse the sparsifier said it was."""
        sparsity = self.sparsifier.sparsity()
        self.sparsifier.finalize()
        return {name: whole(p) for name, p in self.model.named_parameters()}, sparsity


def entire(state):
    """A state without shards."""
    if isinstance(state, dict):
        return {key: entire(value) for key, value in state.items()}
    return whole(state) if isinstance(state, torch.Tensor) else state


def two(case, folder):
    """What two processes do with a case: by replicas, by shards, and from checkpoints of shards and of one process."""
    half, rest = range(STEPS // 2), range(STEPS // 2, STEPS)
    replicas = Run(case, "replicas").train(half).train(rest).end()
    run = Run(case, "shards").train(half)
    dcp.save(run.checkpoint(), checkpoint_id=f"{folder}/two/{case}")
    middle = entire(run.checkpoint())
    shards = run.train(rest).end()
    again = Run(case, "shards").load(f"{folder}/two/{case}").train(rest).end()
    loaded = entire(Run(case, "shards").load(f"{folder}/one/{case}").checkpoint())
    return {"replicas": replicas, "shards": shards, "again": again, "middle": middle, "from one": loaded}


def redundant(case, adam):
    """Weights, learned thresholds and kinds of their optimizers, where each process has a part of the optimizer."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # which warns of its own scripts

    torch.manual_seed(1)
    model = network(norm=False)
    replica = nn.parallel.DistributedDataParallel(model)
    inner = {"optimizer_class": torch.optim.Adam, "lr": 3e-3}
    if not adam:
        inner = {"optimizer_class": torch.optim.SGD, "lr": 0.05, "momentum": 0.9}
    optimizer = ZeroRedundancyOptimizer(model.parameters(), **inner)
    sparsifier = create(case, model, total_steps=STEPS).attach(optimizer)
    for step in range(STEPS):
        images, labels = batch(2 * step + dist.get_rank())
        optimizer.zero_grad()
        F.cross_entropy(replica(images), labels).backward()
        optimizer.step()
    kept = sparsifier.state_dict()["layers"]
    return (
        {name: p.detach() for name, p in model.named_parameters()},
        kept,
        [type(each).__name__ for bucket in sparsifier._buckets for each in bucket.trainers],
    )


def choices(rank):
    """What is chosen over parts of layers, with ties and uneven rows, and over the whole of them."""
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 7), (1, 3), (8, 4, 3))
    layers = [torch.randn(shape, generator=generator).mul(3).round() for shape in shapes]
    parts = [distribute_tensor(layer, mesh, [Shard(0)]) for layer in layers]
    local, shards = [part.to_local() for part in parts], [shard_of("x", part) for part in parts]

    there, here = [], []

    def gathered(some):
        return [whole(DTensor.from_local(m, mesh, [Shard(0)], run_check=False, shape=part.shape, stride=part.stride()))
                for m, part in zip(some, parts, strict=True)]  # fmt: skip

    one = [Prices.one(1.0, 35), Prices.one(49.0, 3), Prices.one(3.5, 96)]
    # Prices that change, and are nothing from some number of weights on.
    several = [Prices((10, 20, 35), (3.0, 1.0, 0.0)), Prices.one(9.0, 3), Prices((5, 50, 96), (0.0, 2.0, 0.5))]
    for prices, budget in ((one, 150.0), (several, 40.0), (several, 77.5), (several, 160.0)):
        there += gathered(masks.within_budget(local, prices, budget, [1, 1, 2], shards))
        here += masks.within_budget(layers, prices, budget, [1, 1, 2])
    return there, here


def refusals():
    """What is said of ways to split that a sparsifier cannot follow."""
    columns, flat, late = (nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU()) for _ in range(3))
    fully_shard(columns, mesh=init_device_mesh("cpu", (2,)), shard_placement_fn=lambda _: Shard(1))
    flat = FullyShardedDataParallel(flat, device_id=torch.device("cpu"))
    cut, cut_late = (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 12)) for _ in range(2))
    fully_shard(cut, mesh=init_device_mesh("cpu", (2,)))
    before = sparse.create("autosparse", cut_late, target=0.5, total_steps=20, block=(4, 4))
    fully_shard(cut_late, mesh=init_device_mesh("cpu", (2,)))
    sparsifier = sparse.create("gmp", late, target=0.5, total_steps=20)
    late = FullyShardedDataParallel(late, device_id=torch.device("cpu"))
    attempts = {
        "columns": lambda: sparse.create("gmp", columns, target=0.5, total_steps=20),
        "flat, before": lambda: sparse.create("gmp", flat, target=0.5, total_steps=20),
        "cut, before": lambda: sparse.create("gmp", cut, target=0.5, total_steps=20, block=(4, 4)),
        "cut, after": lambda: before.attach(torch.optim.SGD(cut_late.parameters(), lr=0.1)),
        "flat, after": lambda: sparsifier.attach(torch.optim.SGD(late.parameters(), lr=0.1)),
    }
    said = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except ValueError as error:
            said[name] = str(error)
    return said


def work(folder):
    return {case: two(case, folder) for case in CASES}, choices(dist.get_rank()), refusals()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    middles = {}
    for case in CASES:
        run = Run(case, "one").train(range(STEPS // 2))
        dcp.save(run.checkpoint(), checkpoint_id=folder / "one" / case, no_dist=True)
        middles[case] = entire(run.checkpoint())
    return *apart(work, folder, str(folder), count=2), middles, folder


@pytest.mark.parametrize("case", CASES)
def test_shards_train_as_replicas_do(both, case):
    (replicas, sparsity), (shards, sharded_sparsity) = both[0][0][case]["replicas"], both[0][0][case]["shards"]
    assert sharded_sparsity == pytest.approx(sparsity, abs=2e-3)
    for name, value in replicas.items():
        torch.testing.assert_close(shards[name], value, rtol=1e-3, atol=1e-4, msg=name)
    for kind in ("replicas", "shards", "again"):
        for name, value in both[0][0][case][kind][0].items():
            assert torch.equal(value, both[1][0][case][kind][0][name]), (kind, name)


@pytest.mark.parametrize("case", CASES)
def test_shards_go_on_from_their_checkpoint_bit_for_bit(both, case):
    (shards, sparsity), (again, sparsity_again) = both[0][0][case]["shards"], both[0][0][case]["again"]
    assert sparsity_again == sparsity
    for name, value in shards.items():
        assert torch.equal(again[name], value), name


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_is_gone_on_from_by_another_number_of_processes(both, case):
    results = both[0][0]
    assert_equal(results[case]["from one"], both[2][case])
    run = Run(case, "one").load(both[3] / "two" / case)
    assert_equal(entire(run.checkpoint()), results[case]["middle"])
    (shards, sparsity), (one, sparsity_of_one) = results[case]["shards"], run.train(range(STEPS // 2, STEPS)).end()
    assert sparsity_of_one == pytest.approx(sparsity, abs=2e-3)
    for name, value in shards.items():
        torch.testing.assert_close(one[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_choices_over_parts_are_those_over_the_whole(both):
    there, here = both[0][1]
    for a, b in zip(there, here, strict=True):
        assert torch.equal(a, b)


def test_other_splits_are_refused(both):
    assert "split along their first dimension" in both[0][2]["columns"]
    for when in ("before", "after"):
        assert "FullyShardedDataParallel" in both[0][2][f"flat, {when}"]
        assert "fully_shard" in both[0][2][f"flat, {when}"]
        said = both[0][2][f"cut, {when}"]
        assert said == both[1][2][f"cut, {when}"]
        assert "layer '1' is split over the processes into parts of 6 outputs, and blocks of 4x4 would" in said
        assert said.endswith("pass exclude=['1']")


@pytest.mark.parametrize(("case", "adam"), [("autosparse-accuracy", False), ("cs", True), ("rigl", False)])
def test_processes_that_share_an_optimizer_train_one_model(case, adam, tmp_path):
    one, other = apart(redundant, tmp_path, case, adam, count=2)
    assert one[2] == other[2] == ["ZeroRedundancyOptimizer", "Adam" if adam else "SGD"]
    assert_equal(one[0], other[0])
    assert_equal(one[1], other[1])
