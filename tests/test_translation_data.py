"""Parallel text: what is read, what is refused, and how it is cut into batches."""

import gzip

import numpy as np
import pytest
import torch

from rarefy.data import translation
from rarefy.data.translation import BEGIN, END, PADDING, Encoded, Pairs
from rarefy.train.token_batches import TokenBatches

pytest.importorskip("tokenizers")

ENGLISH = ["the house is small", "the dog sleeps", "a small dog", "the house sleeps and the dog is small", "dog"]
GERMAN = [
    "das Haus ist klein",
    "der Hund schläft",
    "ein kleiner Hund",
    "das Haus schläft und der Hund ist klein",
    "Hund",
]


def write(folder, names=("train", "valid", "test"), english=ENGLISH, german=GERMAN):
    for name in names:
        (folder / f"{name}.en").write_text("\n".join(english) + "\n", encoding="utf-8")
        (folder / f"{name}.de").write_text("\n".join(german) + "\n", encoding="utf-8")
    return folder


def test_a_folder_either_way(tmp_path):
    corpus = translation.load(write(tmp_path))
    assert corpus.train == Pairs(ENGLISH, GERMAN)
    assert len(corpus.test) == 5
    back = translation.load(tmp_path, ("de", "en"))
    assert back.valid == Pairs(GERMAN, ENGLISH)


def test_the_names_of_wmt16(tmp_path):
    write(tmp_path, ("europarl-v7.de-en", "news-commentary-v11.de-en", "newstest2013", "newstest2014"))
    corpus = translation.load(tmp_path)
    assert corpus.train == Pairs(ENGLISH * 2, GERMAN * 2)
    assert len(corpus.valid) == len(corpus.test) == 5


def test_a_table_and_packed_files(tmp_path):
    table = tmp_path / "corpus.tsv"
    rows = [f"{split}\tx\t{a}\t{b}" for split in translation.SPLITS for a, b in zip(ENGLISH, GERMAN, strict=True)]
    table.write_text("\n".join(rows), encoding="utf-8")
    assert translation.load(table, ("de", "en")).test == Pairs(GERMAN, ENGLISH)
    folder = tmp_path / "packed"
    folder.mkdir()
    for path in write(folder).glob("*.*"):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert translation.load(folder).train == Pairs(ENGLISH, GERMAN)


def test_lines_are_lines(tmp_path):
    """A byte order mark, Windows' line ends, a line separator inside a sentence, and empty sides."""
    write(tmp_path)
    (tmp_path / "train.en").write_bytes("\ufeffone\r\ntwo\u2028too\r\n\r\n  \r\nfive\r\n".encode())
    (tmp_path / "train.de").write_bytes("eins\nzwei\ndrei\nvier\nfünf\n".encode())
    assert translation.load(tmp_path).train == Pairs(["one", "two\u2028too", "five"], ["eins", "zwei", "fünf"])


def test_what_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no corpus at .*rarefy data translation"):
        translation.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"no text for train: it needs train.en or europarl"):
        translation.load(tmp_path)
    write(tmp_path)
    with pytest.raises(ValueError, match="languages must be two"):
        translation.load(tmp_path, ("en", "en"))
    with pytest.raises(ValueError, match=r'languages must be two, such as \("en", "de"\), got \'en\''):
        translation.load(tmp_path, "en")
    for content, message in (
        ("a\nb\nc\nd\ne\nf\n", r"train.de has a line|train.en has a line 6 but .*train.de ends before it"),
        ("a\nb\n", r"train.de has a line 3 but .*train.en ends before it"),
        ("\n\n\n\n\n", "train of .* holds no pair"),
        ("", r"train.de has a line 1 but .*train.en ends before it"),
    ):
        (tmp_path / "train.en").write_text(content)
        with pytest.raises(ValueError, match=message):
            translation.load(tmp_path)
    (tmp_path / "train.en").write_bytes(b"a\nb\n\xff\n")
    with pytest.raises(ValueError, match="train.en, line 3: not UTF-8"):
        translation.load(tmp_path)
    (tmp_path / "train.de").unlink()
    with pytest.raises(FileNotFoundError, match=r"train.en has no counterpart train.de"):
        translation.load(tmp_path)
    table = tmp_path / "corpus.tsv"
    table.write_text("train\tx\ta\tb\nnone\tx\ta\tb\n")
    with pytest.raises(ValueError, match=r"corpus.tsv, line 2: expected train, valid or test"):
        translation.load(table)
    with pytest.raises(ValueError, match="English and German"):
        translation.load(table, ("en", "fr"))
    (tmp_path / "train.en.gz").write_bytes(b"\x1f\x8b broken")
    (tmp_path / "train.en").unlink()
    write(tmp_path, ("valid",))
    (tmp_path / "train.de").write_text("x")
    with pytest.raises(ValueError, match="train.en.gz is cut or altered"):
        translation.load(tmp_path)


@pytest.fixture(scope="module")
def tokenizer():
    return translation.train_tokenizer(Pairs(ENGLISH, GERMAN), 60)


def test_tokens_come_back_as_text(tokenizer):
    assert [tokenizer.token_to_id(token) for token in translation.SPECIAL] == [0, 1, 2, 3]
    assert tokenizer.get_vocab_size() <= 60
    for text in (*ENGLISH, *GERMAN):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert translation.UNKNOWN in tokenizer.encode("猫 sleeps").ids
    assert translation.train_tokenizer(Pairs(ENGLISH, GERMAN), 60).to_str() == tokenizer.to_str()
    ids = translation.read_tokenizer(tokenizer.to_str()).encode("the </s> dog <pad>").ids
    assert not {translation.END, translation.PADDING} & set(ids)
    with pytest.raises(ValueError, match="vocab_size must be more than 4"):
        translation.train_tokenizer(Pairs(ENGLISH, GERMAN), 4)


def test_a_batch_has_begins_ends_and_padding(tokenizer):
    data = Encoded(Pairs(ENGLISH, GERMAN), tokenizer)
    batch = data.batch([4, 0])
    short, long = (tokenizer.encode(GERMAN[i]).ids for i in (4, 0))
    width = len(long) + 1
    assert batch.target.tolist() == [[BEGIN, *short, *[PADDING] * (width - 1 - len(short))], [BEGIN, *long]]
    assert batch.following.tolist() == [[*short, END, *[PADDING] * (width - 1 - len(short))], [*long, END]]
    source = tokenizer.encode(ENGLISH[0]).ids
    assert batch.source[1].tolist() == [*source, END]
    assert batch.lengths.tolist() == [len(tokenizer.encode("dog").ids) + 1, len(source) + 1]
    assert batch.words == len(short) + len(long) + 2


def many(tokenizer, n=300):
    rng = np.random.default_rng(0)
    words = ["the", "house", "is", "small", "dog", "sleeps", "and", "a"]
    texts = [[" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(n)] for _ in range(2)]
    return Encoded(Pairs(*texts), tokenizer)


def rows(batches):
    return sorted(
        (tuple(t for t in s.tolist() if t), tuple(t for t in f.tolist() if t))
        for batch in batches
        for s, f in zip(batch.source, batch.following, strict=True)
    )


def test_every_epoch_has_all_pairs_in_another_order(tokenizer):
    data = many(tokenizer)
    cut = TokenBatches(data, batch_tokens=200, longest=40)
    epochs = [[batch for step, _ in cut.epoch(e) for batch in step] for e in (0, 1)]
    assert len(epochs[0]) == len(epochs[1]) == len(cut)
    assert rows(epochs[0]) == rows(epochs[1]) == rows([data.batch(cut.kept.tolist())])
    assert not torch.equal(epochs[0][0].source, epochs[1][0].source)
    for batch in epochs[0]:
        longer = max(batch.source.shape[1], batch.following.shape[1])
        assert longer * len(batch.source) <= 200
        # of about one length: what is padded is little
        assert batch.lengths.max() <= 40
    for batch, words in ((b, w) for step, w in cut.epoch(0) for b in step):
        assert batch.words == words


def test_it_goes_on_in_mid_epoch_and_is_shared_out(tokenizer):
    data = many(tokenizer)
    options = {"batch_tokens": 120, "longest": 40, "accumulate": 2, "seed": 5}
    whole = list(TokenBatches(data, **options).epoch(3))
    rest = list(TokenBatches(data, **options).epoch(3, 2))
    assert len(whole) == len(rest) + 2
    for (a, n), (b, m) in zip(whole[2:], rest, strict=True):
        assert n == m
        assert all(torch.equal(x.source, y.source) for x, y in zip(a, b, strict=True))
    ranks = [TokenBatches(data, **options, rank=rank, world=2) for rank in (0, 1)]
    one = TokenBatches(data, **{**options, "accumulate": 4})
    for (a, n), (b, m), (both, words) in zip(*(r.epoch(0) for r in ranks), one.epoch(0), strict=True):
        assert n == m == words == sum(batch.words for batch in (*a, *b))
        assert rows([*a, *b]) == rows(both)


def test_long_pairs_are_left_out_and_bad_options_told(tokenizer):
    data = many(tokenizer)
    cut = TokenBatches(data, batch_tokens=100, longest=10)
    assert len(cut.kept) == (np.maximum(*data.lengths) + 1 <= 10).sum() < 300
    with pytest.raises(ValueError, match=r"longest must be in \[2, batch_tokens\]"):
        TokenBatches(data, batch_tokens=30, longest=31)
    with pytest.raises(ValueError, match="no pair has at most 2 tokens"):
        TokenBatches(Encoded(Pairs(ENGLISH[:1], GERMAN[:1]), tokenizer), batch_tokens=30, longest=2)
    with pytest.raises(ValueError, match="lower batch_tokens"):
        TokenBatches(data, batch_tokens=100_000, longest=40, world=9)
