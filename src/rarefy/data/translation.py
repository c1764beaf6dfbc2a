"""Parallel text: files in two languages, or a table, and the numbers of its tokens."""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from tokenizers import Tokenizer

#: Tokens that are no words, and their numbers in every vocabulary made here.
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
PADDING, UNKNOWN, BEGIN, END = range(4)

SPLITS = ("train", "valid", "test")

#: What a folder may call the files of each split, without the language: the first that is there counts; for training
#: all that are in the last group. These are the names of WMT16 and of MLPerf's preparation of it.
_NAMES = {
    "train": (("train",), ("europarl-v7.de-en", "commoncrawl.de-en", "news-commentary-v11.de-en")),
    "valid": (("valid",), ("dev",), ("newstest2013",), ("newstest2015",)),
    "test": (("test",), ("newstest2014",), ("newstest2016",)),
}


@dataclass(frozen=True)
class Pairs:
    """Sentences in two languages: ``target[i]`` translates ``source[i]``; neither is empty."""

    source: list[str]
    target: list[str]

    def __len__(self) -> int:
        return len(self.source)

    def digest(self) -> str:
        """Give the SHA-256 of the sentences, which have no line ends, in their order."""
        return hashlib.sha256("\n".join((*self.source, "", *self.target)).encode()).hexdigest()


@dataclass(frozen=True)
class Corpus:
    """A corpus by its splits, and from which language to which it goes."""

    train: Pairs
    valid: Pairs
    test: Pairs
    languages: tuple[str, str]


def load(place: str | os.PathLike[str], languages: tuple[str, str] = ("en", "de")) -> Corpus:
    """Load a corpus that translates from the first language to the second.

    ``place`` is either

    * a table of four columns, tab between: split (train, valid, test), source of the pair, English and German, as
      ``rarefy data translation`` makes it; or
    * a folder with two files a split, ``train.en`` and ``train.de``, line by line, plain or as ``.gz``; instead of
      ``valid`` and ``test`` the names of WMT16 (newstest2013, newstest2014) and of its training texts.

    A pair of which one side is empty is left out.

    Raises FileNotFoundError for what is not there, ValueError (with the line) for files that are not parallel, not
    UTF-8, or without a single pair.
    """
    path = Path(place)
    if isinstance(languages, str) or len(languages) != 2 or languages[0] == languages[1]:
        raise ValueError(f'languages must be two, such as ("en", "de"), got {languages!r}')
    if path.is_dir():
        train, valid, test = (_folder(path, split, languages) for split in SPLITS)
        return Corpus(train, valid, test, languages)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no corpus at {path}: name a folder with train.{languages[0]}, train.{languages[1]}, valid.*, "
            "test.*, or a table made by: rarefy data translation"
        )
    return _table(path, languages)


def _lines(path: Path) -> list[str]:
    content = path.read_bytes()
    try:
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise ValueError(f"{path} is cut or altered: it cannot be unpacked") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 text") from None
    lines = text.split("\n")  # not splitlines, which cuts at characters that sentences hold
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def _pairs(rows: Iterable[tuple[str, str]], about: str) -> Pairs:
    kept = [(a, b) for a, b in ((a.strip(), b.strip()) for a, b in rows) if a and b]
    if not kept:
        raise ValueError(f"{about} holds no pair of sentences")
    return Pairs([a for a, _ in kept], [b for _, b in kept])


def _file(folder: Path, name: str, language: str) -> Path | None:
    return next((p for p in (folder / f"{name}.{language}", folder / f"{name}.{language}.gz") if p.is_file()), None)


def _folder(folder: Path, split: str, languages: tuple[str, str]) -> Pairs:
    rows: list[tuple[str, str]] = []
    there = False
    for group in _NAMES[split]:
        for name in group:
            one, other = (_file(folder, name, language) for language in languages)
            if one is None and other is None:
                continue
            if one is None or other is None:
                raise FileNotFoundError(
                    f"{one or other} has no counterpart {name}.{languages[0] if one is None else languages[1]}"
                )
            there = True
            rows += _parallel(one, other)
        if there:
            return _pairs(rows, f"{split} of {folder}")
    wanted = " or ".join(f"{group[0]}.{languages[0]}" for group in _NAMES[split])
    raise FileNotFoundError(f"{folder} has no text for {split}: it needs {wanted}, and the same in {languages[1]}")


def _parallel(one: Path, other: Path) -> list[tuple[str, str]]:
    rows = []
    for line, (a, b) in enumerate(zip_longest(_lines(one), _lines(other)), start=1):
        if a is None or b is None:
            ended, goes_on = (one, other) if a is None else (other, one)
            raise ValueError(f"{goes_on} has a line {line} but {ended} ends before it: they must be parallel")
        rows.append((a, b))
    return rows


def _table(path: Path, languages: tuple[str, str]) -> Corpus:
    if set(languages) != {"en", "de"}:
        raise ValueError(f"{path} is a table of English and German, so languages must be en and de, got {languages!r}")
    rows: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    for number, line in enumerate(_lines(path), start=1):
        parts = line.split("\t")
        if len(parts) != 4 or parts[0] not in rows:
            raise ValueError(
                f"{path}, line {number}: expected train, valid or test, source, English, German, tab between"
            )
        split, _, english, german = parts
        rows[split].append((english, german) if languages[0] == "en" else (german, english))
    train, valid, test = (_pairs(rows[split], f"{split} of {path}") for split in SPLITS)
    return Corpus(train, valid, test, languages)


def train_tokenizer(pairs: Pairs, vocab_size: int = 8000) -> Tokenizer:
    """Make the byte-pair encoding of both languages (Sennrich et al., arXiv 1508.07909), :data:`SPECIAL` first.

    Raises ValueError for a vocabulary that has no room for more than those.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size <= len(SPECIAL):
        raise ValueError(f"vocab_size must be more than {len(SPECIAL)}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL[UNKNOWN]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL), limit_alphabet=200, show_progress=False
    )
    tokenizer.train_from_iterator((text for side in (pairs.source, pairs.target) for text in side), trainer)
    return _of_text(tokenizer)


def read_tokenizer(text: str) -> Tokenizer:
    """Return the encoding that :meth:`Tokenizer.to_str` gave.

    Raises ValueError for another text, and for an encoding that does not begin with :data:`SPECIAL`.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = _of_text(Tokenizer.from_str(text))
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"no encoding, or a damaged one: {error}") from None
    first = tuple(tokenizer.id_to_token(index) for index in range(len(SPECIAL)))
    if first != SPECIAL:
        raise ValueError(f"an encoding whose first tokens are {first}, not {SPECIAL}: take one that a run made")
    return tokenizer


def _of_text(tokenizer: Tokenizer) -> Tokenizer:
    """Let the names of the special tokens in a text be text; a tokenizer does not remember that."""
    tokenizer.encode_special_tokens = True
    return tokenizer


class Encoded:
    """The token numbers of pairs, in a few arrays: a corpus of millions stays small.

    Args:
        pairs: the sentences.
        tokenizer: what makes numbers of them.

    """

    def __init__(self, pairs: Pairs, tokenizer: Tokenizer) -> None:
        self._sides = [_flat(tokenizer, texts) for texts in (pairs.source, pairs.target)]
        #: Tokens of each sentence: (N,) int64, source and target; at least 1 with the end.
        self.lengths = [np.diff(offsets) for _, offsets in self._sides]

    def __len__(self) -> int:
        return len(self.lengths[0])

    def tokens(self, side: int, index: int) -> list[int]:
        """Return the tokens of one sentence: side 0 is the source, 1 the target."""
        values, offsets = self._sides[side]
        return [int(token) for token in values[offsets[index] : offsets[index + 1]]]

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return these pairs as tensors."""
        sources = [[*self.tokens(0, index), END] for index in indices]
        targets = [self.tokens(1, index) for index in indices]
        return Batch(
            source=padded(sources),
            lengths=torch.tensor([len(each) for each in sources]),
            target=padded([[BEGIN, *each] for each in targets]),
            following=padded([[*each, END] for each in targets]),
        )


@dataclass(frozen=True)
class Batch:
    """B pairs, padded with :data:`PADDING` at the end.

    Attributes:
        source: (B, S), each with the end.
        lengths: of the sources, (B,).
        target: (B, T), each with the begin: what the decoder is told.
        following: (B, T), each with the end: what it has to say.

    """

    source: Tensor
    lengths: Tensor
    target: Tensor
    following: Tensor

    @property
    def words(self) -> int:
        """Tokens that the decoder has to say."""
        return int((self.following != PADDING).sum())


def padded(sentences: Sequence[Sequence[int]]) -> Tensor:
    """Return token numbers as one tensor (B, longest)."""
    longest = max((len(each) for each in sentences), default=0)
    return torch.tensor([[*each, *[PADDING] * (longest - len(each))] for each in sentences], dtype=torch.long).view(
        len(sentences), longest
    )


def _flat(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """All tokens one after another, and where each sentence begins; encoded some thousands at a time."""
    values: list[npt.NDArray[np.int32]] = [np.zeros(0, np.int32)]
    sizes: list[int] = []
    for begin in range(0, len(texts), 1 << 14):
        encoded = [each.ids for each in tokenizer.encode_batch(list(texts[begin : begin + (1 << 14)]))]
        sizes += [len(each) for each in encoded]
        values.append(np.array([token for each in encoded for token in each], dtype=np.int32))
    return np.concatenate(values), np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
