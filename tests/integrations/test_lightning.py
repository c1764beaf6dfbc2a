"""The callback in the real Trainer of Lightning."""

import csv
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

L = pytest.importorskip("lightning", reason="the extra integrations is not installed")

from rarefy import sparse
from rarefy.integrations.lightning import SparsifierCallback

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:(The dirpath has changed|Checkpoint directory .* is not empty):UserWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`:UserWarning"),
]


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


def loader():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16 * BATCHES, 20, generator=generator)
    y = (x @ torch.randn(20, 5, generator=generator)).argmax(1)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)


def callback_of(method):
    target = {} if method == "nm" else {"target": 0.8}
    return SparsifierCallback(lambda m, steps: sparse.create(method, m, total_steps=steps, **target))


def trainer_of(*callbacks, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    given = {"max_epochs": EPOCHS, "logger": False, "log_every_n_steps": 2, "enable_checkpointing": False, **options}
    return L.Trainer(callbacks=list(callbacks), **quiet, **given)


def fit(folder, method, kind=Module, ckpt_path=None, **options):
    torch.manual_seed(0)
    module, callback = kind(), callback_of(method)
    saving = L.pytorch.callbacks.ModelCheckpoint(dirpath=folder, save_top_k=-1, every_n_epochs=1, save_last=True)
    trainer = trainer_of(callback, saving, enable_checkpointing=True, **options)
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
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
    module, _, _ = fit(tmp_path, method, Two)
    zeros = sum(int((module.body[i].weight == 0).sum()) for i in (0, 2))
    assert zeros / (20 * 64 + 64 * 5) == pytest.approx(0.8, abs=1e-3)


def test_it_is_the_same_as_a_loop_by_hand(tmp_path):
    module, callback, _ = fit(tmp_path, "autosparse", gradient_clip_val=0.5)
    torch.manual_seed(0)
    plain = Module()
    optimizer = plain.configure_optimizers()
    steps = EPOCHS * BATCHES
    sparsifier = sparse.create("autosparse", plain, target=0.8, total_steps=steps).attach(optimizer)
    for _ in range(EPOCHS):
        for x, y in loader():
            optimizer.zero_grad()
            F.cross_entropy(plain.body(x), y).backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            optimizer.step()
    assert callback.sparsifier.steps == sparsifier.steps
    sparsifier.finalize()
    for (name, a), b in zip(module.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.filterwarnings("ignore:(weights were changed outside|finalize.. after 24 of 24 steps goes):UserWarning")
@pytest.mark.parametrize("method", ["gmp", "autosparse"])
@pytest.mark.parametrize("kind", ["StochasticWeightAveraging", "EMAWeightAveraging"])
def test_an_average_that_another_callback_writes_at_the_end_has_the_zeros(tmp_path, method, kind):
    options = {"swa_lrs": 1e-3, "swa_epoch_start": 1} if kind == "StochasticWeightAveraging" else {}
    ends = []
    for sparsifier_first in (True, False):
        torch.manual_seed(0)
        module, averaging = Module(), getattr(L.pytorch.callbacks, kind)(**options)
        saving = L.pytorch.callbacks.ModelCheckpoint(dirpath=tmp_path)
        callbacks = [callback_of(method), averaging][:: 1 if sparsifier_first else -1]
        trainer = trainer_of(saving, *callbacks, enable_checkpointing=True)
        trainer.fit(module, loader())
        assert trainer.callbacks[-1] is saving
        ends.append(module.state_dict())
        assert sum(int((module.body[i].weight == 0).sum()) for i in (0, 2)) == int(0.8 * (20 * 64 + 64 * 5))
    for name, end in ends[0].items():
        assert torch.equal(end, ends[1][name]), name
        if method == "gmp":
            average = dict(averaging._average_model.named_parameters())
            average = average.get(name, average.get(f"module.{name}"))
            assert torch.equal(end, torch.where(end == 0, 0, average)), name


def test_a_checkpoint_of_the_end_has_the_zeros_and_is_not_gone_on_from(tmp_path):
    module, _, trainer = fit(tmp_path, "gmp")
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    loaded = Module.load_from_checkpoint(tmp_path / "end.ckpt")
    weights = [loaded.body[i].weight for i in (0, 2)]
    assert sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights) == pytest.approx(0.8, abs=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), loaded.parameters(), strict=True))
    with pytest.raises(ValueError, match="end.ckpt has no state of a sparsifier, as if it was saved without"):
        fit(tmp_path, "gmp", ckpt_path=tmp_path / "end.ckpt", max_epochs=EPOCHS + 1)


def test_the_number_of_steps_must_be_that_of_the_checkpoint(tmp_path):
    fit(tmp_path, "gmp")
    with pytest.raises(ValueError, match="the checkpoint's sparsifier has total_steps=24, this one 32"):
        fit(tmp_path, "gmp", ckpt_path=tmp_path / "last.ckpt", max_epochs=EPOCHS + 1)


def test_a_checkpoint_that_was_validated_is_not_gone_on_from(tmp_path):
    class Validated(Module):
        def validation_step(self, batch, index):
            return F.cross_entropy(self.body(batch[0]), batch[1])

    _, callback, trainer = fit(tmp_path, "gmp", Validated)
    trainer.validate(ckpt_path=tmp_path / "last.ckpt", dataloaders=loader())
    torch.manual_seed(0)
    again = trainer_of(callback)
    again.fit(Validated(), loader())
    assert callback.sparsifier.steps == EPOCHS * BATCHES


def test_the_logs_have_the_sparsity(tmp_path):
    logger = L.pytorch.loggers.CSVLogger(tmp_path)
    trainer_of(callback_of("gmp"), logger=logger, max_epochs=-1, max_steps=24).fit(Module(), loader())
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        sparsity = [float(row["sparsity"]) for row in csv.DictReader(file)]
    assert len(sparsity) == 12
    assert sparsity == sorted(sparsity)
    assert sparsity[-1] == pytest.approx(0.8, abs=1e-3)


def test_nothing_is_logged_where_nothing_is_to_be(tmp_path):
    trainer = trainer_of(callback_of("gmp"), log_every_n_steps=0)
    trainer.fit(Module(), loader())
    assert "sparsity" not in trainer.callback_metrics


@pytest.mark.parametrize("kind", ["endless", "without a length"])
def test_a_training_without_an_end_is_refused(kind):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([(torch.zeros(20), 0)] * 4)

    trainer = trainer_of(callback_of("gmp"), max_epochs=-1 if kind == "endless" else 2)
    data = loader() if kind == "endless" else torch.utils.data.DataLoader(Stream())
    with pytest.raises(ValueError, match="needs to know when training ends: give the Trainer max_steps"):
        trainer.fit(Module(), data)


@pytest.mark.parametrize("method", sparse.names())
def test_a_dry_run_ends_with_exact_zeros(method):
    callback = callback_of(method)
    trainer_of(callback, fast_dev_run=True).fit(Module(), loader())
    assert callback.sparsifier.steps == 1
    assert callback.sparsifier.sparsity() == pytest.approx(0.5 if method == "nm" else 0.8, abs=1e-3)


def test_what_makes_no_sparsifier_is_refused():
    with pytest.raises(TypeError, match="must return the sparsifier, as lambda .*; it returned NoneType"):
        trainer_of(SparsifierCallback(lambda module, steps: None)).fit(Module(), loader())
    with pytest.raises(TypeError, match="takes how to make the sparsifier, .*lambda model, total_steps: .*; got GMP"):
        SparsifierCallback(sparse.create("gmp", Module(), target=0.8, total_steps=10))
