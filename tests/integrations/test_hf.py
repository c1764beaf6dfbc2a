"""The callback in the real Trainer of transformers, over a small BERT that is made here."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the extra integrations is not installed")

from rarefy import sparse
from rarefy.integrations.hf import FILE, SparsifierCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers', accelerate's and dataloaders' own

STEPS = 12


def make(method, **options):
    def sparsifier(model, total_steps):
        return sparse.create(method, model, total_steps=total_steps, exclude=["classifier"], **options)

    return sparsifier


def trainer(folder, callback, **arguments):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=2
    )
    model = transformers.BertForSequenceClassification(config)
    ids = torch.randint(5, 50, (96, 10), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": int(row[0] > 27)} for row in ids]
    options = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 4,
        "save_steps": 6,
        "report_to": "none",
        "use_cpu": True,
        "seed": 3,
        "disable_tqdm": True,
        **arguments,
    }
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(str(folder), **options),
        train_dataset=data,
        eval_dataset=data[:8],
        callbacks=[callback],
    )


CASES = [("autosparse", {"target": 0.8}), ("gmp", {"target": 0.8}), ("rigl", {"target": 0.8}), ("nm", {})]


@pytest.mark.parametrize(("method", "options"), CASES, ids=[name for name, _ in CASES])
def test_training_ends_with_exact_zeros_and_resumes_with_the_same_bits(tmp_path, method, options):
    callback = SparsifierCallback(make(method, **options))
    whole = trainer(tmp_path / "whole", callback)
    whole.train()
    zeros = 0.5 if method == "nm" else 0.8
    assert callback.sparsifier.steps == STEPS
    assert callback.sparsifier.sparsity() == pytest.approx(zeros, abs=2e-3)
    assert [log["sparsity"] for log in whole.state.log_history if "loss" in log][-1] == pytest.approx(zeros, abs=0.02)
    assert (tmp_path / "whole" / "checkpoint-6" / FILE).is_file()
    resumed = trainer(tmp_path / "whole", SparsifierCallback(make(method, **options)))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_accumulation_clipping_and_bfloat16(tmp_path):
    callback = SparsifierCallback(make("autosparse", target=0.8))
    trainer(tmp_path, callback, gradient_accumulation_steps=2, max_grad_norm=0.5, bf16=True).train()
    assert callback.sparsifier.steps == STEPS
    assert callback.sparsifier.sparsity() == pytest.approx(0.8, abs=2e-3)


def test_a_checkpoint_without_a_state_is_refused(tmp_path):
    made = trainer(tmp_path, transformers.TrainerCallback())
    made.train()
    with pytest.raises(FileNotFoundError, match=f"has no {FILE}: it was saved without this callback"):
        trainer(tmp_path, SparsifierCallback(make("gmp", target=0.8))).train(resume_from_checkpoint=True)


def test_the_best_of_all_checkpoints_is_refused(tmp_path):
    callback = SparsifierCallback(make("gmp", target=0.8))
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 6}
    made = trainer(tmp_path, callback, **options, metric_for_best_model="loss")
    with pytest.raises(ValueError, match="load_best_model_at_end would take the weights of a checkpoint"):
        made.train()
