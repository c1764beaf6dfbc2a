"""Training a translator: it learns, resumes to the bit, and says in words what it does not take."""

import io
import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("tokenizers")
pytest.importorskip("sacrebleu")

from rarefy.cli import translate as command
from rarefy.cli.main import main
from rarefy.data.translation import Pairs, train_tokenizer
from rarefy.models import GNMT
from rarefy.train import TrainingInterruptedError, activation_share, parse, prepare
from rarefy.train import run as run_module
from rarefy.train.translation import TOKENIZER, Translator, _groups, load_translator
from tests.processes import run_two
from tests.train.runs import digest, stop_at

NOUNS = {"dog": "Hund", "tree": "Baum", "table": "Tisch", "man": "Mann"}
VERBS = {"sleeps": "schläft", "falls": "fällt", "stands": "steht"}
PLACES = {"here": "hier", "there": "dort", "today": "heute"}
CORPUS = [
    (f"the {a} {b} {c}", f"der {x} {y} {z}")
    for a, x in NOUNS.items()
    for b, y in VERBS.items()
    for c, z in PLACES.items()
]


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A folder of parallel text whose three splits are the same: what is learned by heart is translated rightly."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(run_module, "RECORDS", 5)
    folder = tmp_path / "text"
    folder.mkdir()
    for split in ("train", "valid", "test"):
        for language, texts in zip(("en", "de"), zip(*CORPUS, strict=True), strict=True):
            (folder / f"{split}.{language}").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return folder


def recipe(folder: Path, **changes):
    plain = {
        "name": "test",
        "model": {"name": "gnmt", "hidden_size": 32, "num_layers": 2, "dropout": 0.0},
        "data": {"name": "translation", "folder": str(folder), "vocab_size": 60, "longest": 20},
        "optimizer": {"name": "adamw", "lr": 0.01, "weight_decay": 0.0, "clip_norm": 1.0},
        "schedule": {"epochs": 2, "batch_size": 80},
        "threads": 1,
    }
    for key, value in changes.items():
        plain[key] = {**plain.get(key, {}), **value} if isinstance(value, dict) else value
    return parse(plain)


def weights(run):
    return {name: digest(p) for name, p in run.plain_model.named_parameters()}


@pytest.mark.slow
def test_it_learns_by_heart_and_the_command_translates(corpus, tmp_path, capsys, monkeypatch):
    made = recipe(corpus, schedule={"epochs": 40})
    (tmp_path / "recipe.yaml").write_text(json.dumps(made.to_dict()))
    folder = tmp_path / "run"
    assert main(["train", str(tmp_path / "recipe.yaml"), "--run", str(folder), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["test_bleu"] == pytest.approx(100.0)
    assert summary["valid_perplexity"] < 1.1
    assert "version:" in summary["bleu_signature"]
    assert 0 < summary["activation_share"] == summary["activation_seconds"] / summary["batch_seconds"]
    page = (folder / "report.html").read_text()
    assert "BLEU 100.00 on the test set" in page
    assert CORPUS[0][1] in page
    assert summary["bleu_signature"] in page
    assert "tanh and sigmoid timed by themselves" in page
    assert page.count("Attention of a translation") == 3
    drawn = json.loads((folder / "attention.json").read_text())["sentences"]
    assert "".join(drawn[0]["source"]).replace("\u2581", " ").strip() == f"{CORPUS[0][0]}</s>"
    assert "".join(drawn[0]["target"]).replace("\u2581", " ").strip() == f"{CORPUS[0][1]}</s>"
    for each in drawn:
        assert [len(row) for row in each["weights"]] == [len(each["source"])] * len(each["target"])
        assert [sum(row) for row in each["weights"]] == pytest.approx([1.0] * len(each["target"]), abs=0.01)

    translator = load_translator(folder)
    english, german = zip(*CORPUS, strict=True)
    for beam in (1, 4):
        assert tuple(translator(list(english), beam=beam)) == german
        assert tuple(translator.compiled()(list(english), beam=beam)) == german
    assert translator(["", english[3], "猫"], beam=2)[:2] == ["", german[3]]
    text = tmp_path / "in.txt"
    text.write_text("  ")
    assert main(["translate", str(folder), str(text)]) == 0
    assert capsys.readouterr().out == "\n"
    assert main(["translate", str(folder), str(tmp_path / "nothing")]) == 1
    assert "there is no text file" in capsys.readouterr().err
    text.write_text(f"{english[5]}\n\n{english[0]}\n")
    assert main(["translate", str(folder), str(text)]) == 0
    assert capsys.readouterr().out == f"{german[5]}\n\n{german[0]}\n"
    assert main(["translate", str(folder), str(text), "--engine"]) == 0
    assert capsys.readouterr().out == f"{german[5]}\n\n{german[0]}\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(english[7].encode())))
    assert main(["translate", str(folder), "--output", str(tmp_path / "out.txt"), "--beam", "1"]) == 0
    assert (tmp_path / "out.txt").read_text() == f"{german[7]}\n"
    text.write_bytes(b"fine\n\xff\n")
    assert main(["translate", str(folder), str(text)]) == 1
    out, err = capsys.readouterr()
    assert (out, "line 2: not UTF-8" in err) == ("", True)  # of a file, before the first line is translated
    content = f"\ufeff{english[1]}\r\n \r\n{' '.join(english[:5])}\n{english[2]}".encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert main(["translate", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[:2] + out.splitlines()[3:] == [german[1], "", german[2]]
    assert "line 3: " in err
    assert "the run learned from up to 20 (data.longest)" in err
    assert main(["translate", str(folder), "--beam", "0"]) == 1
    (folder / TOKENIZER).write_text("{}")
    with pytest.raises(ValueError, match="is no encoding, or a damaged one"):
        load_translator(folder)


@pytest.mark.parametrize(
    "changes", [{}, {"method": {"name": "autosparse", "target": 0.8}, "schedule": {"accumulate": 2, "batch_size": 120}}]
)
def test_resuming_changes_no_bit(corpus, tmp_path, changes):
    made = recipe(corpus, model={"dropout": 0.2}, **changes)
    whole = prepare(made, tmp_path / "whole")
    whole.train()
    with pytest.raises(TrainingInterruptedError):
        prepare(made, tmp_path / "pieces").train(stop_at(3))
    rest = prepare(made, tmp_path / "pieces", resume=True)
    assert rest.step == 3
    rest.train()
    assert weights(rest) == weights(whole)
    one, other = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "pieces"))
    assert one["valid_perplexity"] == other["valid_perplexity"]
    assert one["samples"] == other["samples"]
    if changes:
        assert one["sparsity"] == pytest.approx(0.8, abs=0.01)


def test_other_sentences_are_not_resumed_with(corpus, tmp_path):
    with pytest.raises(TrainingInterruptedError):
        prepare(recipe(corpus), tmp_path / "run").train(stop_at(3))
    corpus.rename(tmp_path / "moved")
    lines = (tmp_path / "moved" / "train.de").read_text().splitlines()
    with pytest.raises(TrainingInterruptedError):
        prepare(recipe(tmp_path / "moved"), tmp_path / "run", resume=True).train(stop_at(4))
    (tmp_path / "moved" / "train.de").write_text("".join(f"{line}\n" for line in reversed(lines)))
    with pytest.raises(ValueError, match=r"sentences in .*moved are not those that the run began with"):
        prepare(recipe(tmp_path / "moved"), tmp_path / "run", resume=True)


def test_micro_batches_weigh_their_tokens(corpus, tmp_path):
    """One step over two micro-batches has the gradient of all its tokens at once."""
    run = prepare(recipe(corpus, schedule={"accumulate": 2, "batch_size": 160}), tmp_path / "run")
    batches, words = next(iter(run.batches.epoch(0)))
    total = sum(run._loss(run.plain_model, batch) for batch in batches) / words
    expected = torch.autograd.grad(total, list(run.plain_model.parameters()))
    seen = {}
    clip = run.accelerator.clip_grad_norm_

    def keep(parameters, norm):
        seen.update(enumerate(p.grad.clone() for p in run.plain_model.parameters()))
        return clip(parameters, norm)

    run.accelerator.clip_grad_norm_ = keep
    run._optimizer_step((batches, words))
    for index, gradient in enumerate(expected):
        torch.testing.assert_close(seen[index], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_two_processes_train_one_model(corpus, tmp_path):
    run_two("tests.train.two_translators", tmp_path)
    one, other = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert one["weights"] == other["weights"] == one["resumed"] == other["resumed"]
    assert one["stopped"] == other["stopped"] == 3
    assert other["summary"] == {}
    # The same sentences a step, in one process: the sum of gradients is taken in another order.
    alone = prepare(recipe(corpus, schedule={"batch_size": 160, "accumulate": 2}), tmp_path / "alone").train()
    assert one["summary"]["valid_perplexity"] == pytest.approx(alone["valid_perplexity"], rel=1e-3)
    assert one["split"]["valid_perplexity"] == pytest.approx(one["summary"]["valid_perplexity"], rel=1e-3)
    assert one["split"]["samples"] == one["summary"]["samples"]


def test_one_token_sentences_and_long_ones(corpus, tmp_path):
    for language, text in (("en", "dog\n" * 20), ("de", "Hund\n" * 20)):
        (corpus / f"train.{language}").write_text(text)
    long = " ".join(["dog"] * 200)
    (corpus / "test.en").write_text(f"dog\n{long}\n")
    (corpus / "test.de").write_text(f"Hund\n{long}\n")
    summary = prepare(recipe(corpus), tmp_path / "run").train()
    assert len(summary["samples"]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"name": "fashion_cnn"}}, "model.name must be gnmt|option of model"),
        ({"data": {"name": "fashion_mnist"}}, "unknown key in data"),
        ({"data": {"folder": None}}, "data.folder must be a table or a folder"),
        ({"data": {"languages": ["en"]}}, "data.languages must be two"),
        ({"data": {"vocab_size": 3}}, r"data.vocab_size must be in \(4"),
        ({"data": {"longest": 100}}, "data.longest must be in"),
        ({"data": {"train_size": 1000}}, "data.train_size must be at most 36"),
        ({"data": {"name": "translatoin"}}, "did you mean 'translation'"),
        ({"model": {"mode": "exakt"}}, "mode must be one of torch"),
        ({"optimizer": {"clip_norm": 0.0}}, "optimizer.clip_norm must be above 0"),
        ({"schedule": {"batch_size": 40, "accumulate": 40}}, "data.longest must be in"),
    ],
)
def test_what_is_refused(corpus, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare(recipe(corpus, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_comparisons_are_refused(corpus, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(json.dumps(recipe(corpus).to_dict()))
    (tmp_path / "c.yaml").write_text("recipe: r.yaml\nseeds: 1\ntargets: [0.9]\nmethods: {R: {name: rigl}}\n")
    assert main(["compare", str(tmp_path / "c.yaml"), "--run", str(tmp_path / "runs")]) == 1
    assert "which a translator has not" in capsys.readouterr().err


def test_there_is_nothing_to_translate_with(corpus, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no run in"):
        load_translator(tmp_path)
    run = prepare(recipe(corpus), tmp_path / "run")
    with pytest.raises(TrainingInterruptedError):
        run.train(stop_at(2))
    with pytest.raises(FileNotFoundError, match="the run is not finished"):
        load_translator(tmp_path / "run")
    (tmp_path / "run" / TOKENIZER).unlink()
    with pytest.raises(FileNotFoundError, match=r"put the encoding back"):
        prepare(recipe(corpus), tmp_path / "run", resume=True)


class InPieces(io.BytesIO):
    """A pipe of which each reading gives what was written at once."""

    def __init__(self, *pieces):
        self.pieces = [*pieces, b""]

    def read1(self, size=-1):
        return self.pieces.pop(0)


def test_lines_come_as_they_are_there():
    said = "é".encode()
    pipe = InPieces(b"a\nb", b"c\r\n", said[:1], said[1:] + b"\n\n", b"end")
    assert list(command._lines(pipe, "x")) == [["a"], ["bc"], ["é", ""], ["end"]]
    assert list(command._lines(InPieces(b""), "x")) == []
    lines = command._lines(InPieces(b"a\nb\n", b"c\n\xff\n"), "x")
    assert [next(lines), next(lines)] == [["a", "b"], ["c"]]
    with pytest.raises(ValueError, match="x, line 4: not UTF-8 text"):
        next(lines)


def test_a_run_takes_the_encoding_of_another(corpus, tmp_path):
    given = tmp_path / "given.json"
    encoding = train_tokenizer(Pairs(["dog man"], ["Hund Mann"]), 30).to_str()
    given.write_text(encoding, encoding="utf-8")
    made = recipe(corpus, data={"tokenizer": str(given)})
    run = prepare(made, tmp_path / "run")
    assert run.tokenizer.to_str() == encoding
    assert run.plain_model.source_embedding.num_embeddings == run.tokenizer.get_vocab_size()
    given.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=f"{given} is no encoding, or a damaged one: 'utf-8'"):
        prepare(made, tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="is a folder: name the file"):
        prepare(recipe(corpus, data={"tokenizer": str(tmp_path)}), tmp_path / "other")
    given.write_text("{}")
    with pytest.raises(ValueError, match=f"{given} is no encoding"):
        prepare(made, tmp_path / "other")
    foreign = json.loads(encoding)
    foreign["added_tokens"], vocabulary = [], foreign["model"]["vocab"]
    foreign["model"]["vocab"] = {token.replace("<pad>", "pad"): number for token, number in vocabulary.items()}
    given.write_text(json.dumps(foreign))
    with pytest.raises(ValueError, match="whose first tokens are .*take one that a run made"):
        prepare(made, tmp_path / "other")


def test_a_long_sentence_is_searched_for_alone():
    groups = _groups([5, 0, 3000, *[4] * 70, 2000], 64, 4096)
    assert groups == [[*range(3, 67)], [67, 68, 69, 70, 71, 72, 0], [73], [2]]


@pytest.mark.parametrize(
    ("texts", "options", "error", "said"),
    [
        ("one sentence", {}, TypeError, "takes a list of sentences, .* got str"),
        ([b"bytes", "text"], {}, TypeError, "got list of bytes, str"),
        (["text"], {"beam": 1.5}, ValueError, "beam must be a positive whole number, got 1.5"),
        (["text"], {"beam": True}, ValueError, "got True"),
    ],
)
def test_a_translator_says_what_it_takes(texts, options, error, said):
    translate = Translator(GNMT(9, hidden_size=6, num_layers=2), train_tokenizer(Pairs(["a"], ["b"]), 9), 20)
    with pytest.raises(error, match=said):
        translate(texts, **options)


def test_a_line_without_numbers_is_named(tmp_path, capsys, monkeypatch):
    tokenizer = train_tokenizer(Pairs(["a b"], ["c d"]), 20)
    model = GNMT(tokenizer.get_vocab_size(), hidden_size=6, num_layers=2)
    with torch.no_grad():
        model.source_embedding.weight[tokenizer.encode("b").ids] = math.nan
    translator = Translator(model, tokenizer, 20)
    with pytest.raises(ValueError, match="the sentence at index 2 has no translation"):
        translator(["", "a a a a", "b", "a"])
    (tmp_path / "text").write_text("a\n\na a a\nb\na\n")
    monkeypatch.setattr("rarefy.train.translation.load_translator", lambda run: translator)
    assert main(["translate", str(tmp_path), str(tmp_path / "text")]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert "line 4 has no translation: the network's logits for it are NaN" in output.err


@pytest.mark.parametrize("mode", ["torch", "ktanh"])
def test_the_activations_of_a_batch(mode, monkeypatch):
    """Five numbers for each hidden one of five LSTMs, one for each of a pair of tokens: each kind as often as it is."""
    model = GNMT(9, hidden_size=6, num_layers=2, mode=mode)
    source, target = torch.ones(3, 5, dtype=torch.long), torch.ones(3, 4, dtype=torch.long)
    seen = []
    monkeypatch.setattr(activation_share, "_call", lambda name, tanh, shape, *rest: seen.append((name, tuple(shape))))
    kinds = activation_share._kinds(model, lambda: model(source, torch.tensor([5, 5, 5]), target).sum())
    counts = dict(zip(seen, [count for _, count in kinds], strict=True))
    encoder, decoder = {("sigmoid", (3, 5, 18)): 3, ("tanh", (3, 5, 12)): 3}, {("sigmoid", (3, 4, 18)): 2}
    assert counts == {**encoder, **decoder, ("tanh", (3, 4, 12)): 2, ("tanh", (3, 4, 5, 6)): 1}
    monkeypatch.undo()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    measured = activation_share.measure(model, lambda: model(source, torch.tensor([5, 5, 5]), target).sum())
    assert measured.activations > 0
    assert measured.batch > 0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
    assert not any(module._forward_hooks for module in model.modules())


def test_16_bits_are_refused_where_the_lstm_has_them_not(corpus, tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("could not create a primitive descriptor for the LSTM")

    monkeypatch.setattr(torch.nn.LSTM, "forward", fails)
    with pytest.raises(ValueError, match=r"LSTM does not run in precision: bf16 on this cpu .*take model.mode: exact"):
        prepare(recipe(corpus, precision="bf16"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_pairs_have_a_length():
    assert len(Pairs(["a"], ["b"])) == 1
