"""The callback in the real Trainer of Lightning."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

L = pytest.importorskip("lightning", reason="the extra integrations is not installed")

from rarefy import sparse
from rarefy.integrations.lightning import SparsifierCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own

EPOCHS, BATCHES = 3, 8


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5))

    def training_step(self, batch, index):
        loss = F.cross_entropy(self.body(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=5e-3)


class Two(Module):
    """Two optimizers, stepped by hand."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.body(batch[0]), batch[1]))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self):
        first, last = self.body[0], self.body[2]
        return torch.optim.SGD(first.parameters(), lr=0.1), torch.optim.AdamW(last.parameters(), lr=5e-3)


def fit(folder, method, kind=Module, ckpt_path=None, **options):
    torch.manual_seed(0)
    module = kind()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16 * BATCHES, 20, generator=generator)
    y = (x @ torch.randn(20, 5, generator=generator)).argmax(1)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)
    target = {} if method == "nm" else {"target": 0.8}
    callback = SparsifierCallback(lambda m, steps: sparse.create(method, m, total_steps=steps, **target))
    saving = L.pytorch.callbacks.ModelCheckpoint(dirpath=folder, save_top_k=-1, every_n_epochs=1)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    trainer = L.Trainer(
        max_epochs=EPOCHS, callbacks=[callback, saving], logger=False, log_every_n_steps=2, **quiet, **options
    )
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return module, callback, trainer


@pytest.mark.parametrize("method", ["autosparse", "dst", "cs", "gmp", "rigl", "nm"])
def test_training_ends_with_exact_zeros_and_resumes_with_the_same_bits(tmp_path, method):
    whole, callback, trainer = fit(tmp_path, method)
    zeros = 0.5 if method == "nm" else 0.8
    assert callback.sparsifier.steps == EPOCHS * BATCHES
    assert callback.sparsifier.sparsity() == pytest.approx(zeros, abs=1e-3)
    assert trainer.callback_metrics["sparsity"] > 0
    first = next(path for path in tmp_path.iterdir() if path.name.startswith("epoch=0"))
    resumed, again, _ = fit(tmp_path / "again", method, ckpt_path=first)
    assert again.sparsifier.steps == EPOCHS * BATCHES
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_accumulation_clipping_and_bfloat16(tmp_path):
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "precision": "bf16-mixed"}
    _, callback, _ = fit(tmp_path, "autosparse", **options)
    assert callback.sparsifier.steps == EPOCHS * BATCHES // 2
    assert callback.sparsifier.sparsity() == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("method", ["autosparse", "gmp"])
def test_two_optimizers_stepped_by_hand(tmp_path, method):
    torch.manual_seed(0)
    module, callback, _ = fit(tmp_path, method, Two)
    zeros = sum(int((module.body[i].weight == 0).sum()) for i in (0, 2))
    assert zeros / (20 * 64 + 64 * 5) == pytest.approx(0.8, abs=1e-3)


def test_a_training_without_an_end_is_refused(tmp_path):
    callback = SparsifierCallback(lambda m, steps: sparse.create("gmp", m, total_steps=steps, target=0.8))
    trainer = L.Trainer(max_epochs=-1, callbacks=[callback], logger=False, accelerator="cpu", enable_progress_bar=False)
    loader = torch.utils.data.DataLoader([(torch.zeros(20), 0)] * 4)
    with pytest.raises(ValueError, match="needs to know when training ends"):
        trainer.fit(Module(), loader)
