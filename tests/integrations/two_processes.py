"""What each of two processes does in test_processes.py: ``python -m tests.integrations.two_processes FOLDER``."""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard

from rarefy import sparse
from rarefy.cli import leave
from rarefy.integrations._callback import whole_state
from rarefy.integrations.hf import SparsifierCallback
from tests.integrations.test_hf import make, trainer

METHODS: dict[str, dict[str, Any]] = {
    "autosparse": {"target": 0.8},
    "rigl": {"target": 0.8},
    "topk": {"target": 0.8},
    "nm": {"exclude": ["2"]},
}
STEPS = 10


def in_a_trainer(folder: Path) -> dict[str, float]:
    """A run of the trainer under DDP, and one that goes on from its checkpoint."""
    ends = []
    for resume in (False, True):
        made = trainer(folder, SparsifierCallback(make("autosparse", target=0.8)))
        made.train(resume_from_checkpoint=str(folder / "checkpoint-6") if resume else None)
        ends.append({name: p.detach().clone() for name, p in made.model.named_parameters()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    return {name: float(p.double().norm()) for name, p in ends[0].items()}


def sharded(
    method: str, options: dict[str, Any], shard: bool
) -> tuple[nn.Module, torch.optim.Optimizer, sparse.Sparsifier]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 65), nn.ReLU(), nn.Linear(65, 5))
    if shard:
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    return model, optimizer, sparse.create(method, model, total_steps=STEPS, **options).attach(optimizer)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 20, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.cross_entropy(model(x), x[:, :5].argmax(1)).backward()
        optimizer.step()


def over_shards(folder: Path) -> None:
    """One process writes what is whole; shards, and a model that is in one piece, go on from it."""
    for method, options in METHODS.items():
        model, optimizer, sparsifier = sharded(method, options, shard=True)
        train(model, optimizer, range(STEPS // 2))
        state = whole_state(sparsifier)
        weights = {key: value.full_tensor() for key, value in model.state_dict().items()}
        if torch.distributed.get_rank() == 0:
            torch.save(state, folder / f"{method}.pt")
        torch.distributed.barrier()
        loaded = torch.load(folder / f"{method}.pt", weights_only=True)
        for shard in (True, False):
            other, *_, again = sharded(method, options, shard=shard)
            set_model_state_dict(other, dict(weights), options=StateDictOptions(full_state_dict=True))
            again.load_state_dict(loaded)
            assert again.steps == STEPS // 2
            assert again.layers() == sparsifier.layers(), method
            for (name, p), value in zip(other.named_parameters(), weights.values(), strict=True):
                assert torch.equal(p.full_tensor() if shard else p, value), (method, name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    where = Path(sys.argv[1])
    told = in_a_trainer(where / "trainer")
    over_shards(where)
    (where / f"rank{os.environ['RANK']}.json").write_text(json.dumps(told))
    leave(0)
