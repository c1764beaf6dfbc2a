"""The callback in the real Trainer of transformers, over a small BERT that is made here."""

import pytest
import torch

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers", reason="the extra integrations is not installed")

from rarefy import sparse
from rarefy.integrations.hf import FILE, SparsifierCallback

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


@pytest.mark.slow
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
    with pytest.raises(FileNotFoundError, match=f"checkpoint-12 has no {FILE}, as if it was saved without this"):
        trainer(tmp_path, SparsifierCallback(make("gmp", target=0.8))).train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_a_checkpoint_outside_the_output_folder_must_be_named(tmp_path):
    whole, other = (trainer(tmp_path / name, SparsifierCallback(make("rigl", target=0.8))) for name in "ab")
    other.args.seed = 4
    whole.train()
    other.train()
    elsewhere = str(tmp_path / "a" / "checkpoint-6")
    lost = trainer(tmp_path / "b", SparsifierCallback(make("rigl", target=0.8)))
    with pytest.raises(ValueError, match=r"sparsifier.pt is of other weights than the model has; .*name it in Train"):
        lost.train(resume_from_checkpoint=elsewhere)
    named = trainer(tmp_path / "b", SparsifierCallback(make("rigl", target=0.8)), resume_from_checkpoint=elsewhere)
    named.train(resume_from_checkpoint=elsewhere)
    for (name, a), b in zip(whole.model.named_parameters(), named.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_limited_number_of_checkpoints_holds_the_last_state(tmp_path):
    made = trainer(tmp_path, SparsifierCallback(make("autosparse", target=0.8)), save_total_limit=1, save_steps=4)
    made.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-12"]
    again = trainer(tmp_path, SparsifierCallback(make("autosparse", target=0.8)))
    again.train(resume_from_checkpoint=True)  # nothing is left to do but the end
    for (name, a), b in zip(made.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_what_logs_later_sees_the_sparsity(tmp_path):
    class Later(transformers.TrainerCallback):
        seen = ()

        def on_log(self, args, state, control, logs, **_):
            self.seen = (*self.seen, logs["sparsity"])

    later = Later()
    made = trainer(tmp_path, SparsifierCallback(make("gmp", target=0.8)))
    made.add_callback(later)
    made.train()
    made.evaluate()
    assert len(later.seen) == 3 + 1 + 1  # steps 4, 8, 12; the end; the evaluation of the finalized model
    assert later.seen[-1] == pytest.approx(0.8, abs=2e-3)


@pytest.mark.parametrize("kind", ["gpt2", "vit"])
def test_other_networks(tmp_path, kind):
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2)
        model = transformers.GPT2LMHeadModel(config)
        rows = torch.randint(50, (32, 10))
        data = [{"input_ids": row, "labels": row} for row in rows]
    else:
        config = transformers.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=16,
            patch_size=8,
        )
        model = transformers.ViTForImageClassification(config)
        data = [{"pixel_values": image, "labels": 0} for image in torch.randn(32, 3, 16, 16)]
    callback = SparsifierCallback(lambda m, steps: sparse.create("autosparse", m, target=0.8, total_steps=steps))
    options = {"max_steps": STEPS, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    transformers.Trainer(
        model, transformers.TrainingArguments(str(tmp_path), **options), train_dataset=data, callbacks=[callback]
    ).train()
    layers = callback.sparsifier.layers()
    assert len(layers) >= 8
    used = sum(int((model.get_parameter(f"{layer.name}.weight") != 0).sum()) for layer in layers)
    assert used / sum(layer.weights for layer in layers) == pytest.approx(0.2, abs=2e-3)


def test_an_optimizer_without_a_schedule(tmp_path):
    pytest.importorskip("schedulefree")
    options = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"}
    options |= {"eval_strategy": "steps", "eval_steps": 3}
    whole = trainer(tmp_path, SparsifierCallback(make("autosparse", target=0.8)), **options)
    whole.train()
    assert whole.callback_handler.callbacks[-2].sparsifier.sparsity() == pytest.approx(0.8, abs=2e-3)
    end = [parameter.clone() for parameter in whole.model.parameters()]
    whole.evaluate()
    assert all(torch.equal(a, b) for a, b in zip(end, whole.model.parameters(), strict=True))
    resumed = trainer(tmp_path, SparsifierCallback(make("autosparse", target=0.8)), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 6}, "load_best_model_at_end would"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size starts over"),
    ],
)
def test_what_would_spoil_the_result_is_refused(tmp_path, options, message):
    made = trainer(tmp_path, SparsifierCallback(make("gmp", target=0.8)), **options)
    before = [parameter.clone() for parameter in made.model.parameters()]
    with pytest.raises(ValueError, match=message):
        made.train()
    assert all(torch.equal(a, b) for a, b in zip(before, made.model.parameters(), strict=True))


def test_what_makes_no_sparsifier_is_refused(tmp_path):
    made = trainer(tmp_path, SparsifierCallback(lambda model, steps: None))
    with pytest.raises(TypeError, match="must return the sparsifier, as lambda .*; it returned NoneType"):
        made.train()
    with pytest.raises(TypeError, match="takes how to make the sparsifier, .*lambda model, total_steps: .*; got GMP"):
        SparsifierCallback(sparse.create("gmp", made.model, target=0.8, total_steps=10))
