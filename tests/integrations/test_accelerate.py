"""A loop of accelerate's: what it prepares is attached, and the sparsifier is saved with the rest."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from rarefy import sparse

STEPS, PARTS = 20, 2


@pytest.fixture(autouse=True)
def _of_its_own():
    """Accelerate keeps the precision of the first accelerator of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def made(method, precision="no"):
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=PARTS)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    options = {} if method == "nm" else {"target": 0.8}
    sparsifier = sparse.create(method, model, total_steps=STEPS, **options).attach(optimizer)
    accelerator.register_for_checkpointing(sparsifier)
    return accelerator, model, optimizer, scheduler, sparsifier


def train(accelerator, model, optimizer, scheduler, steps):
    for step in steps:
        for part in range(PARTS):
            x = torch.randn(8, 20, generator=torch.Generator().manual_seed(PARTS * step + part))
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(x).float(), x[:, :5].argmax(1)))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()


@pytest.mark.parametrize(
    ("method", "precision"),
    [("autosparse", "no"), ("autosparse", "bf16"), ("dst", "no"), ("rigl", "bf16"), ("nm", "no")],
)
def test_a_loop_lands_and_resumes_with_the_same_bits(tmp_path, method, precision):
    whole = made(method, precision)
    train(*whole[:4], range(STEPS // 2))
    whole[0].save_state(tmp_path)
    train(*whole[:4], range(STEPS // 2, STEPS))
    assert whole[4].steps == STEPS
    assert whole[4].sparsity() == pytest.approx(0.5 if method == "nm" else 0.8, abs=2e-3)
    resumed = made(method, precision)
    resumed[0].load_state(tmp_path)
    assert resumed[4].steps == STEPS // 2
    train(*resumed[:4], range(STEPS // 2, STEPS))
    for (name, a), b in zip(whole[1].named_parameters(), resumed[1].parameters(), strict=True):
        assert torch.equal(a, b), name
