"""Training a translator by a recipe."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rarefy import _checks
from rarefy.data import translation
from rarefy.data.translation import BEGIN, END, PADDING, Batch, Encoded, Pairs
from rarefy.models import GNMT
from rarefy.models.search import NotANumberError, translate
from rarefy.models.search import Translation as Found
from rarefy.train import activation_share
from rarefy.train.cross_entropy import cross_entropy
from rarefy.train.recipe import Translation as Data
from rarefy.train.recipe import load
from rarefy.train.run import Run
from rarefy.train.run_folder import ABOUT
from rarefy.train.token_batches import TokenBatches

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from rarefy.models.compiled import CompiledGNMT

#: The file of a run's byte-pair encoding.
TOKENIZER = "tokenizer.json"

#: The file of what the attention looked at in some translations.
ATTENTION = "attention.json"

#: Sentences, and tokens of them with their padding, that are translated at once at most: a long one waits for none.
SEARCH_BATCH, SEARCH_TOKENS = 64, 4096

#: Sentences of the test that a summary shows, and of how many pieces at most the attention is drawn, of how many.
SAMPLES = 8
LEGIBLE, DRAWN = 24, 3


class Translation(Run):
    """One run of a recipe that trains GNMT; see :class:`~rarefy.train.run.Run`.

    The loss is the cross-entropy of a target token, over all tokens of an optimizer step alike.
    """

    metric, larger_is_better = "valid_perplexity", False
    evaluated: GNMT

    def _load_data(self) -> None:
        data, schedule = self._data, self.recipe.schedule
        assert data.folder is not None
        first, second = data.languages
        self.corpus = translation.load(data.folder, (first, second))
        size = data.train_size or len(self.corpus.train)
        if size > len(self.corpus.train):
            raise ValueError(f"data.train_size must be at most {len(self.corpus.train)}, got {size}")
        pairs = Pairs(self.corpus.train.source[:size], self.corpus.train.target[:size])
        splits = {"train": pairs, "valid": self.corpus.valid, "test": self.corpus.test}
        self._about = {name: {"pairs": len(some), "sha256": some.digest()} for name, some in splits.items()}
        if self._resumed:
            self.folder.compare(ABOUT, self._about, f"the sentences in {data.folder}")
        self.tokenizer = self._tokenizer(pairs)
        world = self.accelerator.num_processes
        encoded = Encoded(pairs, self.tokenizer)
        self.batches = TokenBatches(
            encoded,
            batch_tokens=schedule.batch_size // (schedule.accumulate * world),
            longest=data.longest,
            accumulate=schedule.accumulate,
            seed=self.recipe.seed,
            rank=self.accelerator.process_index,
            world=world,
        )
        # What a sentence costs is that of one of middling length.
        order = np.argsort(encoded.lengths[1][self.batches.kept], kind="stable")
        middle = encoded.batch([int(self.batches.kept[order[len(order) // 2]])])
        self.example = (middle.source, middle.lengths, middle.target)
        self._valid = Encoded(self.corpus.valid, self.tokenizer)

    @property
    def _data(self) -> Data:
        assert isinstance(self.recipe.data, Data)
        return self.recipe.data

    def _tokenizer(self, pairs: Pairs) -> Tokenizer:
        """The encoding that the run began with, the recipe's, or a new one: the main process's for all."""
        text = [""]
        if self.is_main:
            if self._resumed:
                text = [load_tokenizer(self.folder.path / TOKENIZER).to_str()]
            elif self._data.tokenizer is not None:
                text = [load_tokenizer(Path(self._data.tokenizer)).to_str()]
            else:
                text = [translation.train_tokenizer(pairs, self._data.vocab_size).to_str()]
        broadcast_object_list(text)
        return translation.read_tokenizer(text[0])

    def _beside(self) -> dict[str, str]:
        return {TOKENIZER: self.tokenizer.to_str(), ABOUT: json.dumps(self._about, indent=1) + "\n"}

    def _make_model(self) -> nn.Module:
        options, device = self.recipe.model.options, self.accelerator.device
        if self.recipe.precision != "fp32" and options.get("mode", "torch") == "torch":
            try:
                with torch.no_grad(), self.accelerator.autocast():
                    nn.LSTM(1, 1, device=device)(torch.zeros(1, 1, 1, device=device))
            except RuntimeError as error:
                raise ValueError(
                    f"PyTorch's LSTM does not run in precision: {self.recipe.precision} on this "
                    f"{device.type} ({error!s:.40}...): take model.mode: exact, or precision: fp32"
                ) from error
        return GNMT(self.tokenizer.get_vocab_size(), **options)

    def _learn(self, content: tuple[list[Batch], int]) -> None:
        batches, words = content
        # Gradients are means over processes and micro-batches: times their number they are those of the sum.
        share = self.accelerator.num_processes * len(batches) / words
        for batch in batches:
            with self.accelerator.accumulate(self.model):
                total = self._loss(self.model, batch, self.recipe.schedule.label_smoothing)
                self._step_on(total * share)
            self._losses.append(total.detach() / batch.words)

    def _loss(self, model: nn.Module, batch: Batch, smoothing: float = 0.0) -> Tensor:
        """The sum over the batch's target tokens."""
        device = self.accelerator.device
        logits = model(batch.source.to(device), batch.lengths.to(device), batch.target.to(device))
        return cross_entropy(logits.flatten(0, 1), batch.following.to(device).flatten(), PADDING, smoothing)

    def _evaluate(self) -> dict[str, float]:
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        sums = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
        for batch in list(_in_order(self._valid))[rank::world]:
            with self.accelerator.autocast():
                sums[0] += self._loss(self.evaluated, batch).double()
            sums[1] += batch.words
        loss, words = self.accelerator.reduce(sums).tolist()
        return {"valid_loss": loss / words, "valid_perplexity": math.exp(min(loss / words, 700.0))}

    def _results(self) -> dict[str, Any]:
        """BLEU of greedy translations of the test's sentences, by sacreBLEU, with its signature, and some of them.

        What the attention of some looked at goes into a file of its own.
        """
        from sacrebleu.metrics.bleu import BLEU

        test, model = self.corpus.test, self.evaluated.eval()
        ids = [each.ids for each in self.tokenizer.encode_batch(test.source)]
        with self.accelerator.autocast():
            found = _search(model, ids)
            drawn = attentions(model, self.tokenizer, ids, found)
        self.folder.write_json(ATTENTION, {"sentences": drawn})
        said = [self.tokenizer.decode(tokens) for tokens in found]
        metric = BLEU()
        score = metric.corpus_score(said, [test.target])
        samples = [
            {"source": source, "reference": reference, "translation": text}
            for source, reference, text in list(zip(test.source, test.target, said, strict=True))[:SAMPLES]
        ]
        signature = str(metric.get_signature())
        return {"test_bleu": score.score, "bleu_signature": signature, "samples": samples, **self._activation_share()}

    def _activation_share(self) -> dict[str, float]:
        """What tanh and sigmoid take of a batch's forward and backward pass, on the run's device."""
        model = self.evaluated.train()
        (batch, *_), _ = next(self.batches.epoch(0))
        with self.accelerator.autocast():
            measured = activation_share.measure(model, lambda: self._loss(model, batch))
        model.eval()
        seconds = {"activation_seconds": measured.activations, "batch_seconds": measured.batch}
        return {"activation_share": measured.share, **seconds}


@torch.no_grad()
def attentions(
    model: GNMT, tokenizer: Tokenizer, sources: list[list[int]], targets: list[list[int]]
) -> list[dict[str, Any]]:
    """Return what the decoder looks at as it says translations, of the first sentences that a picture has room for.

    Each has the pieces of its source, with the end, and of its target, with the end if it is said, cut where a picture
    ends; and weights[target][source] in [0, 1], of which a row sums to 1.
    """
    fits = [index for index, source in enumerate(sources) if 1 <= len(source) < LEGIBLE]
    device, found = next(model.parameters()).device, []
    for index in sorted(fits, key=lambda i: len(sources[i]) < LEGIBLE // 4)[:DRAWN]:  # the shortest show little
        source = [*sources[index], END]
        memory = model.encode(torch.tensor([source], device=device), torch.tensor([len(source)], device=device))
        told = torch.tensor([[BEGIN, *targets[index]]], device=device)
        logits, _, weights = model.decode(told, memory)
        said = [*targets[index], *([END] if int(logits[0, -1].argmax()) == END else [])][:LEGIBLE]
        found.append(
            {
                "source": [tokenizer.id_to_token(token) for token in source],
                "target": [tokenizer.id_to_token(token) for token in said],
                "weights": [[round(weight, 4) for weight in row] for row in weights[0, : len(said)].tolist()],
            }
        )
    return [each for each in found if each["target"]]


def _in_order(data: Encoded, tokens: int = 4096) -> list[Batch]:
    """All pairs in batches of about so many tokens, of one length together."""
    sizes = np.maximum(*data.lengths) + 1
    batches: list[Batch] = []
    some: list[int] = []
    for index in np.argsort(sizes, kind="stable"):
        if some and (len(some) + 1) * sizes[index] > tokens:
            batches.append(data.batch(some))
            some = []
        some.append(int(index))
    return [*batches, data.batch(some)]


def _read(path: Path) -> str:
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder: name the file of an encoding, such as {path / TOKENIZER}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: put the encoding back, or begin a new run without it")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no encoding, or a damaged one: {error}") from None


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a run's encoding. Raises FileNotFoundError without the file, ValueError for one that is damaged."""
    text = _read(path)
    try:
        return translation.read_tokenizer(text)
    except ValueError as error:
        raise ValueError(f"{path} is {error}") from None


def translate_texts(
    model: GNMT | CompiledGNMT, tokenizer: Tokenizer, texts: list[str], *, beam: int = 1, **options: Any
) -> list[str]:
    """Translate sentences, in evaluation mode; an empty one gives an empty one.

    ``options`` are those of :func:`rarefy.models.search.translate`.
    """
    ids = [each.ids for each in tokenizer.encode_batch(texts)]
    return [tokenizer.decode(tokens) for tokens in _search(model, ids, beam=beam, **options)]


def _search(model: GNMT | CompiledGNMT, ids: list[list[int]], **options: Any) -> list[list[int]]:
    """The tokens of the best translations of sentences without their ends; none for an empty one.

    Raises NotANumberError, by the index in ``ids``, where the model's logits are NaN.
    """
    device = next(model.parameters()).device if isinstance(model, GNMT) else torch.device("cpu")
    said: list[list[int]] = [[] for _ in ids]
    many = 8 if device.type == "cuda" else 1  # sentences that a GPU searches in the time of one
    for some in _groups([len(each) for each in ids], many * SEARCH_BATCH, many * SEARCH_TOKENS):
        sentences = [[*ids[index], END] for index in some]
        source = translation.padded(sentences).to(device)
        lengths = torch.tensor([len(each) for each in sentences], device=device)
        try:
            found: list[Found] = translate(model, source, lengths, begin=BEGIN, end=END, **options)
        except NotANumberError as error:
            raise NotANumberError(some[error.sentence]) from None
        for index, each in zip(some, found, strict=True):
            said[index] = each.tokens
    return said


def _groups(lengths: list[int], most: int, tokens: int) -> list[list[int]]:
    """The indices of sentences of some length, about equally long ones together, so many and so many tokens at once."""
    groups: list[list[int]] = []
    for index in sorted((index for index, length in enumerate(lengths) if length), key=lengths.__getitem__):
        last = groups[-1] if groups else []
        fits = len(last) < most and (len(last) + 1) * (lengths[index] + 1) <= tokens
        if last and fits:
            last.append(index)
        else:
            groups.append([index])
    return groups


class Translator:
    """A trained run's model with its encoding: sentences in, sentences out.

    Attributes:
        longest: tokens of the longest sentence, with its end, that the model may have learned from.

    """

    def __init__(self, model: GNMT | CompiledGNMT, tokenizer: Tokenizer, longest: int) -> None:
        self.model = model.eval() if isinstance(model, GNMT) else model
        self.tokenizer, self.longest = tokenizer, longest

    def compiled(self) -> Translator:
        """Return one that runs on the engine; see :class:`rarefy.models.compiled.CompiledGNMT`."""
        from rarefy.models.compiled import CompiledGNMT  # late: training has no use for the engine

        if isinstance(self.model, CompiledGNMT):
            return self
        return Translator(CompiledGNMT(self.model), self.tokenizer, self.longest)

    def lengths(self, texts: list[str]) -> list[int]:
        """Return how many tokens each sentence has, with its end."""
        return [len(each.ids) + 1 for each in self.tokenizer.encode_batch(texts)]

    def __call__(self, texts: list[str], *, beam: int = 1) -> list[str]:
        """Translate sentences; see :func:`translate_texts`.

        Raises TypeError for anything but a list (or tuple) of sentences, ValueError for a beam below 1, and, as
        :class:`rarefy.models.search.NotANumberError`, for a sentence for which the model's logits are NaN.
        """
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            kinds = (
                ", ".join(sorted({type(text).__name__ for text in texts})) if isinstance(texts, (list, tuple)) else ""
            )
            raise TypeError(
                f"a translator takes a list of sentences, such as ['How are you?'], got {type(texts).__name__}"
                + (f" of {kinds}" if kinds else "")
            )
        _checks.whole("beam", beam)  # before anything is encoded
        return translate_texts(self.model, self.tokenizer, texts, beam=beam)


def load_translator(run: str | os.PathLike[str]) -> Translator:
    """Load what a finished run made, by its folder.

    Raises FileNotFoundError for a folder without a finished run, ValueError for one of another task or damaged files.
    """
    run = Path(run)
    if not (run / "recipe.yaml").is_file():
        raise FileNotFoundError(f"there is no run in {run}: name the folder that rarefy train wrote")
    recipe = load(run / "recipe.yaml")
    if not isinstance(recipe.data, Data):
        raise ValueError(f"{run} trained {recipe.model.name} on {recipe.data.name}: it does not translate")
    weights = run / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"{weights} is missing: the run is not finished; --resume goes on with it")
    tokenizer = load_tokenizer(run / TOKENIZER)
    model = GNMT(tokenizer.get_vocab_size(), **recipe.model.options)
    try:
        model.load_state_dict(load_file(weights))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{weights} does not fit the recipe beside it, or is damaged: {error!s:.200}") from error
    return Translator(model, tokenizer, recipe.data.longest)
