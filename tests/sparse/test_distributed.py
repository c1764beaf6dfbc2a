"""Several processes: a model sharded by fully_shard is made sparse as a whole one, and all of them decide alike."""

import io
import os
import types
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from rarefy import sparse
from rarefy.sparse import masks
from rarefy.sparse.shards import Shard as Part
from tests.sparse.methods import CASES, batch, network

HALF, ALL = 5, 10

#: Cases whose sums over a layer come in another order when it is in parts: thresholds differ in their last bits.
SUMS = {name for name in CASES if name.startswith(("autosparse", "str", "ltp", "st3"))}

#: What three processes try: every kind of state, and sums, rows and single numbers where rows do not divide.
THREE = ["autosparse-channel", "autosparse-block", "autosparse-sparse-backward", "nm", "rigl", "gmp-flops", "st3-sigma"]
THREE += ["topkast", "optg", "dst", "ltp", "cs"]


def shard(model, **options):
    """Split as users do: blocks first, then the rest."""
    fully_shard(model[3], **options)
    return fully_shard(model, **options)


class Run:
    """A case in this process: "whole", "ddp", or sharded before the sparsifier is made or between that and attach()."""

    def __init__(self, case: str, how: str, *, loss_on: tuple[int, ...] = (0, 1, 2), norm: bool = True, **sharding):
        torch.manual_seed(1)
        index = list(CASES).index(case)
        self.loss_on, self.rank = loss_on, dist.get_rank() if dist.is_initialized() else 0
        self.model: nn.Module = network(norm)
        if how == "before":
            shard(self.model, **sharding)
        name, options = CASES[case]
        if "target_flops" in options:
            options = {**options, "example_input": torch.zeros(1, 2, 8, 8)}
        if name == "acdc":
            options = {**options, "phase": 0.1}  # a step at least
        self.sparsifier = sparse.create(name, self.model, total_steps=ALL, **options)
        if how == "between":
            shard(self.model, **sharding)
        if how == "ddp":
            self.model = nn.parallel.DistributedDataParallel(self.model)
        if index // 2 % 2:
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        else:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        self.sparsifier.attach(self.optimizer)

    def train(self, steps: int, closure: bool = False) -> "Run":
        for _ in range(steps):
            images, labels = batch(4 * self.sparsifier.steps + self.rank, 16)

            def backward(images=images, labels=labels) -> torch.Tensor:
                self.optimizer.zero_grad()
                loss = F.cross_entropy(self.model(images), labels) * (self.rank in self.loss_on)
                loss.backward()
                return loss

            if closure:
                self.optimizer.step(backward)
            else:
                backward()
                self.optimizer.step()
        return self

    def state(self) -> dict:
        return {
            "model": self.sparsifier.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sparsifier": self.sparsifier.state_dict(),
        }

    def load(self, state: dict) -> "Run":
        self.sparsifier.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sparsifier.load_state_dict(state["sparsifier"])
        return self

    def end(self) -> dict:
        """The weights used and the layers now, and the weights after finalize()."""
        used = whole(dict(self.sparsifier.model.named_parameters()))
        layers = self.sparsifier.layers()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the short run cuts at once
            final = whole(dict(self.sparsifier.finalize().named_parameters()))
        return {"used": used, "layers": layers, "sparsity": self.sparsifier.sparsity(), "final": final}


def whole(state):
    """A state without shards."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, DTensor):
        return state.full_tensor().detach().clone()
    return state.detach().clone() if isinstance(state, torch.Tensor) else state


def assert_same(a, b, where=""):
    """Equal to the bit."""
    assert type(a) is type(b) or isinstance(a, torch.Tensor), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def assert_alike(case, a, b):
    """Masks are equal, and so are weights, to the bit where no sums are in them."""
    for key in ("used", "final"):
        for name, value in a[key].items():
            other = b[key][name]
            if case in SUMS:
                assert torch.equal(value != 0, other != 0), (key, name)
                torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-5)
            else:
                assert torch.equal(value, other), (key, name)
    assert [layer.live for layer in a["layers"]] == [layer.live for layer in b["layers"]]
    assert a["sparsity"] == b["sparsity"]
    thresholds = [[layer.threshold or 0.0 for layer in run["layers"]] for run in (a, b)]
    assert thresholds[0] == pytest.approx(thresholds[1], rel=1e-3)


def start(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )


def finish(results, world: int, folder: str) -> None:
    torch.save(results, f"{folder}/{world}-{dist.get_rank()}.pt")
    dist.barrier()
    os._exit(0)  # the end of the interpreter may abort (pytorch/pytorch#190489)


def error_of(function) -> str:
    try:
        function()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


# What runs in two processes


def two(rank: int, folder: str) -> None:
    start(rank, 2, folder)
    results, checkpoint = {}, {}
    for index, case in enumerate(CASES):
        results[case, "ddp"] = Run(case, "ddp").train(ALL).end()
        how = ("before", "between")[index % 2]
        run = Run(case, how).train(HALF)
        checkpoint[case] = run.state()
        results[case, "half"] = whole(checkpoint[case]["sparsifier"])
        resumed = Run(case, how).load(checkpoint[case]).train(ALL - HALF).end()
        results[case, "fsdp"] = run.train(ALL - HALF).end()
        results[case, "resumed"] = resumed
    dcp.save(checkpoint, checkpoint_id=f"{folder}/two", no_dist=False)
    results["from one"] = loaded(f"{folder}/one", "before")
    for name in ("bf16", "hsdp", "closure", "not finite", "unused", "gathered", "refused", "whole"):
        results[name] = globals()[f"try_{name.replace(' ', '_')}"](folder)
    finish(results, 2, folder)


def loaded(folder: str, how: str, **options) -> dict:
    """The sparsifiers' states after a checkpoint was loaded, and after they go on for a step."""
    states = {}
    for case in CASES:
        run = Run(case, how)
        state = {case: run.state()}
        dcp.load(state, checkpoint_id=folder, **options)
        run.load(state[case])
        states[case] = whole(run.sparsifier.state_dict())
        used = whole(dict(run.sparsifier.model.named_parameters()))
        assert all(torch.equal(used[key], value) for key, value in whole(state[case]["model"]).items() if key in used)
        if case in THREE:
            run.train(1)
    return states


def try_bf16(folder: str) -> dict:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)
    found = {}
    for case in ("autosparse-cost", "rigl", "topk"):
        run = Run(case, "before", norm=False, mp_policy=policy).train(ALL)
        assert all(layer.local.dtype == torch.float32 for layer in run.sparsifier._layers)
        goal = run.sparsifier.budget.goal
        found[case] = (1 - goal, run.end()["sparsity"])
    return found


def try_hsdp(folder: str) -> dict:
    found = {}
    for shape in ((1, 2), (2, 1)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        for case in ("autosparse-accuracy", "rigl", "cs"):
            found[case, shape] = Run(case, "between", mesh=mesh).train(ALL).end()
    return found


def try_closure(folder: str) -> dict:
    return {how: Run("topk", how).train(ALL, closure=True).end() for how in ("ddp", "before")}


def try_not_finite(folder: str) -> dict:
    found = {}
    for case in ("autosparse-accuracy", "rigl", "ltp"):
        run = Run(case, "before").train(HALF)
        if run.rank == 1:
            layer = run.sparsifier._layers[1]
            layer.grad.fill_(float("nan"))
        run.optimizer.step()
        told = "finite" in run.sparsifier._told
        run.train(2)
        found[case] = (told, run.sparsifier.steps, error_of(run.sparsifier.finalize))
    return found


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.last = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.relu(self.used(x)))


def try_unused(folder: str) -> list[str]:
    model = fully_shard(Unused())
    sparsifier = sparse.create("gmp", model, target=0.5, total_steps=ALL)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    return [layer.name for layer in sparsifier.layers()]


def try_gathered(folder: str) -> None:
    """What a forward alone has gathered does not outlive a change of the weights."""
    images, _ = batch(0)
    run = Run("gmp", "before").train(HALF)
    run.model.eval()
    with torch.no_grad():
        run.model(images)
        state = run.state()
        assert isinstance(state["sparsifier"]["layers"]["0"]["mask"], DTensor)
        run.model(images)
        run.sparsifier.finalize()
        plain = network().eval()
        plain.load_state_dict(whole(run.model.state_dict()))
        assert torch.equal(run.model(images), plain(images))
        model = network()
        shard(model)
        model(images)
        sparsifier = sparse.create("gmp", model, target=0.9, total_steps=ALL)
        assert all(layer.shard is not None for layer in sparsifier._layers)


def try_refused(folder: str) -> dict[str, str]:
    def make(model: nn.Module) -> sparse.Sparsifier:
        return sparse.create("gmp", model, target=0.5, total_steps=ALL)

    def columns() -> None:
        model = nn.Sequential(nn.Linear(8, 8))
        mesh = init_device_mesh("cpu", (2,))
        model[0].weight = nn.Parameter(distribute_tensor(model[0].weight, mesh, [Shard(1)]))
        make(model)

    def two_ways() -> None:
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        fully_shard(model[0], mesh=mesh["a"])
        fully_shard(model[1], mesh=mesh["b"])
        make(model)

    def wrapped(before: bool, original: bool) -> None:
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        sparsifier = None if before else make(model)
        model = FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))
        if sparsifier is None:
            make(model)
        else:
            sparsifier.attach(torch.optim.SGD(model.parameters(), lr=0.1))

    def old_optimizer() -> None:
        model = nn.Sequential(nn.Linear(8, 8))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        fully_shard(model)
        make(model).attach(optimizer)

    def whole_copy() -> None:
        run = Run("gmp", "before").train(ALL)
        run.sparsifier.finalize(network())

    found = {"columns": error_of(columns), "two ways": error_of(two_ways), "old optimizer": error_of(old_optimizer)}
    found["whole copy"] = error_of(whole_copy)
    for before in (True, False):
        for original in (True, False):
            found[f"fsdp1 {before} {original}"] = error_of(lambda b=before, o=original: wrapped(b, o))
    return found


def try_whole(folder: str) -> dict:
    """Full tensors, through torch.save, into shards."""
    run = Run("autosparse-channel", "before").train(HALF)
    file = io.BytesIO()
    torch.save(whole(run.sparsifier.state_dict()), file)
    file.seek(0)
    other = Run("autosparse-channel", "between")
    other.sparsifier.load_state_dict(torch.load(file, weights_only=True))
    return {"saved": whole(run.sparsifier.state_dict()), "loaded": whole(other.sparsifier.state_dict())}


# What runs in three


def three(rank: int, folder: str) -> None:
    start(rank, 3, folder)
    results = {"choices": choices(rank)}
    for case in THREE:
        # Only one process has a gradient, so that the sum of them is the same in any order.
        results[case, "ddp"] = Run(case, "ddp", loss_on=(0,)).train(ALL).end()
        results[case, "fsdp"] = Run(case, "before", loss_on=(0,)).train(ALL).end()
    results["from two"] = loaded(f"{folder}/two", "between")
    finish(results, 3, folder)


def choices(rank: int) -> int:
    """The choices over parts equal those of the whole tensors; gives how many were compared."""
    generator = torch.Generator().manual_seed(0)
    shapes, compared = [(7, 4), (2, 8), (1, 4), (9, 4, 3)], 0
    for ties in (False, True):
        scores = [torch.randn(shape, generator=generator) for shape in shapes]
        if ties:
            scores = [score.round() for score in scores]
            scores[0][0, :2] = -0.0
            scores[2].fill_(torch.inf)
            scores[3][4] = -torch.inf
        parts = []
        for shape in shapes:
            lengths = [len(chunk) for chunk in torch.arange(shape[0]).chunk(3)] + [0, 0]
            parts.append((sum(lengths[:rank]), lengths[rank]))
        here = [slice(first, first + length) for first, length in parts]
        shards = [Part(dist.group.WORLD, first) for first, _ in parts]
        for mixed in (False, True):  # a layer that every process has whole
            mine = [*here]
            known: list[Part | None] = [*shards]
            if mixed:
                mine[1], known[1] = slice(None), None
            local = [score[rows] for score, rows in zip(scores, mine, strict=True)]
            counts = [0, 5, 4, 50]
            wholes = [masks.top_k(score, k)[rows] for score, k, rows in zip(scores, counts, mine, strict=True)]
            assert_same(dict(enumerate(masks.top_k_each(local, counts, known))), dict(enumerate(wholes)))
            for score, part, rows, group in zip(scores, local, mine, known, strict=True):
                for k in (0, 1, score.numel() // 3, score.numel() - 1, score.numel()):
                    assert torch.equal(masks.top_k(part, k, group), masks.top_k(score, k)[rows])
                    compared += 1
                mask = masks.top_k(score, score.numel() // 2)
                sizes = score.abs().masked_fill(~mask, -1.0)
                for block in (1, 4):
                    growth = torch.randn(score.shape, generator=generator)
                    expected = masks.drop_and_grow(sizes, mask, growth, 0.5, block)[rows]
                    found = masks.drop_and_grow(sizes[rows], mask[rows], growth[rows], 0.5, block, group)
                    assert torch.equal(found, expected)
                    compared += 1
                one = torch.full((1,) * score.dim(), 0.3, dtype=torch.float64)
                size = score.double().abs()
                assert torch.equal(masks.separate(size[rows], one, mask[rows], group), masks.separate(size, one, mask))
                each = one.expand(score.shape[0], *one.shape[1:])
                expected = masks.separate(size, each, mask)[rows]
                assert torch.equal(masks.separate(size[rows], each[rows], mask[rows]), expected)
            for costs in ((1.0, 1.0, 1.0, 1.0), (1.0, 2.5, 0.3, 7.0)):
                total = sum(cost * score.numel() for cost, score in zip(costs, scores, strict=True))
                for share in (0.15, 0.5, 1.0):
                    expected = masks.within_budget(scores, costs, share * total, [1, 1, 1, 2])
                    found = masks.within_budget(local, costs, share * total, [1, 1, 1, 2], known)
                    for mask, whole_mask, rows in zip(found, expected, mine, strict=True):
                        assert torch.equal(mask, whole_mask[rows])
                    assert masks.count_all(found, known) == [int(mask.sum()) for mask in expected]
                    compared += 1
    return compared


# The tests


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, list[dict]]:
    """What every process found, by the number of processes."""
    folder = str(tmp_path_factory.mktemp("distributed"))
    torch.set_num_threads(1)
    states = {case: Run(case, "whole").train(HALF).state() for case in CASES}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dcp's own, about a process alone
        dcp.save(states, checkpoint_id=f"{folder}/one", no_dist=True)
    found: dict[int, list[dict]] = {1: [{case: whole(state["sparsifier"]) for case, state in states.items()}]}
    for world, work in ((2, two), (3, three)):
        torch.multiprocessing.spawn(work, (folder,), nprocs=world)
        paths = [Path(folder, f"{world}-{rank}.pt") for rank in range(world)]
        found[world] = [torch.load(path, weights_only=False) for path in paths]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found[1].append(loaded(f"{folder}/two", "whole", no_dist=True))
    return found


@pytest.mark.parametrize("case", CASES)
def test_two_processes_agree(results, case):
    first, second = results[2]
    for key in ("ddp", "half", "fsdp"):
        assert_same(first[case, key], second[case, key])


@pytest.mark.parametrize("case", CASES)
def test_shards_become_as_sparse_as_whole_weights(results, case):
    assert_alike(case, results[2][0][case, "fsdp"], results[2][0][case, "ddp"])


@pytest.mark.parametrize("case", THREE)
def test_rows_that_do_not_divide(results, case):
    for found in results[3]:
        assert_alike(case, found[case, "fsdp"], results[3][0][case, "ddp"])


@pytest.mark.parametrize("case", CASES)
def test_resume_of_shards_is_bit_equal_to_an_uninterrupted_run(results, case):
    assert_same(results[2][0][case, "resumed"], results[2][0][case, "fsdp"])


@pytest.mark.parametrize("case", CASES)
def test_resume_on_another_number_of_processes(results, case):
    one, two = results[1][0][case], results[2][0][case, "half"]
    assert_same(results[2][0]["from one"][case], one)
    assert_same(results[1][1][case], two)
    assert_same(results[3][2]["from two"][case], two)


def test_choices_over_parts_are_those_of_the_whole(results):
    assert len({found["choices"] for found in results[3]}) == 1
    assert results[3][0]["choices"] > 100


def test_full_tensors_are_taken_by_shards(results):
    assert_same(results[2][1]["whole"]["loaded"], results[2][1]["whole"]["saved"])


def test_mixed_precision_lands_on_the_target(results):
    for target, sparsity in results[2][0]["bf16"].values():
        assert sparsity == pytest.approx(target, abs=2e-3)


def test_replicas_of_shards(results):
    for (case, _), found in results[2][0]["hsdp"].items():
        assert_alike(case, found, results[2][0][case, "ddp"])


def test_closures(results):
    found = results[2][0]["closure"]
    assert_alike("topk", found["before"], found["ddp"])


def test_nan_in_one_part_stops_all_processes_alike(results):
    first, second = (found["not finite"] for found in results[2])
    assert first == second
    for told, steps, error in first.values():
        assert told
        assert steps == HALF + 3
        assert error.startswith("ValueError: the weights of 1 of 4 sparsified layers, '3' first, are not finite")


def test_unused_layers_are_left_out_by_all_alike(results):
    assert [found["unused"] for found in results[2]] == [["used", "last"]] * 2


def test_other_ways_to_split_are_refused(results):
    for found in results[2]:
        errors = found["refused"]
        assert errors["columns"].startswith("ValueError: layer '0' is split as (Shard(dim=1),); a sparsifier takes")
        assert "shard all of them over one mesh" in errors["two ways"]
        assert "made after it was sharded" in errors["old optimizer"]
        assert "is not sharded as that of the trained one" in errors["whole copy"]
        for before in (True, False):
            for original in (True, False):
                assert "torch.distributed.fsdp.fully_shard (FSDP2) or use DDP" in errors[f"fsdp1 {before} {original}"]


def test_deepspeed_is_refused():
    module = types.ModuleType("deepspeed.runtime.zero")
    engine = type("DeepSpeedEngine", (nn.Module,), {"__module__": module.__name__})()
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = type("DeepSpeedZeroOptimizer", (), {"optimizer": optimizer})()
    inside = type("BF16_Optimizer", (), {"__module__": "deepspeed.runtime.bf16_optimizer"})()
    with pytest.raises(ValueError, match=r"DeepSpeedEngine.*use DDP"):
        sparse.create("gmp", engine, target=0.5, total_steps=10)
    before = model[0].weight.clone()
    sparsifier = sparse.create("static", model, target=0.5, total_steps=10)
    for refused in (held, inside):
        with pytest.raises(ValueError, match=r"buffers of its own.*DDP or FSDP2 \(fully_shard\)"):
            sparsifier.attach(refused)
    assert torch.equal(model[0].weight, before)
