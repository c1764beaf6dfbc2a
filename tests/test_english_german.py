"""The corpus out of packages: what becomes of texts, in small; the whole is built by `rarefy data translation`."""

from collections import Counter

import pytest

from rarefy.cli.main import main
from rarefy.data import english_german
from rarefy.data.english_german.sentences import _cut, _is_pair, distinct, sentences, split
from rarefy.data.english_german.texts import _clean, _paragraphs, _sections


def test_texts_are_cleaned():
    assert _clean("<p>A  <b>bold</b>\u00ad word &amp; more .</p>") == "A bold word & more."
    assert _clean("_Open the &file\\nnow", interface=True) == "Open the file now"
    assert _clean("snake_case stays_so", interface=True) == "snake_case stays_so"
    assert _clean("• a point -") == "a point"


def test_sentences_end_at_their_ends():
    assert _cut("It works, e.g. Here it does. Really? Yes.") == ["It works, e.g. Here it does.", "Really?", "Yes."]
    assert _cut("Version 2. Then more") == ["Version 2. Then more"]
    pairs = [("s", "One is here. Two is there.", "Eins ist hier. Zwei ist dort."), ("s", "One. Two.", "Nur eins.")]
    raw = Counter()
    assert list(sentences(iter(pairs), raw)) == [
        ("s", "One is here.", "Eins ist hier."),
        ("s", "Two is there.", "Zwei ist dort."),
        ("s", "One. Two.", "Nur eins."),
    ]
    assert raw == {"s": 2}


def test_which_pairs_are_kept():
    assert _is_pair("the house is small", "das Haus ist klein")
    assert not _is_pair("the house", "das Haus ist klein")  # too short
    assert not _is_pair("the house is small and stands by the road", "das Haus")  # far shorter
    assert not _is_pair("open the file now", "open the file jetzt")  # not translated
    assert not _is_pair("the house is small", "the home is not big")  # English
    assert not _is_pair("see 1 2 3 4 5 6 7 8 9 as", "siehe 1 2 3 4 5 6 7 8 9 als")  # numbers
    kept = distinct(
        iter(
            [
                ("a", "The house is small.", "Das Haus ist klein."),
                ("b", "the HOUSE is small!", "Das Gebäude ist klein."),
                ("b", "The building is small.", "Das Haus ist klein"),
            ]
        )
    )
    assert kept == [("a", "The house is small.", "Das Haus ist klein.")]


def test_what_is_held_out_is_new():
    words = "one two three four five six seven eight nine ten eleven twelve".split()  # noqa: SIM905
    pairs = [("s", f"{a} {b} {c} {d} {a} {c}", "x") for a in words for b in words for c in words for d in words[:3]]
    splits = split(pairs)
    known = set(splits["train"])
    assert len(splits["train"]) > 0.9 * len(pairs)
    for pair in (*splits["valid"], *splits["test"]):
        assert pair not in known
    assert not set(splits["valid"]) & set(splits["test"])
    assert split(pairs) == splits


def test_manuals_and_descriptions_become_paragraphs():
    page = '.TH X 1\n.\\" a comment\n.SH NAME\nx \\- does \\fBmuch\\fP\n.PP\nUse\n.B a \\&b\nnow.\n'
    page += ".nf\nraw\n.fi\n.SH END\nLast.\n"
    assert _sections(page) == [
        [],
        [("SH", ""), ("h", "NAME"), ("t", "x - does much"), ("PP", ""), ("t", "Use a b now.")],
        [("SH", ""), ("h", "END"), ("t", "Last.")],
    ]
    assert _paragraphs(["One", "goes on.", ".", "  * a point", "  * another", "    goes on", "", "End"]) == [
        "One goes on.",
        "a point",
        "another goes on",
        "End",
    ]


def test_missing_packages_are_named(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="lacks the packages libreoffice-l10n-de, gcc-12-locales"):
        english_german.build(tmp_path, tmp_path / "out.tsv", fetch=False)
    assert main(["data", "translation", "--output", str(tmp_path / "x.csv")]) == 1
    assert "--output must be a .tsv file" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.tsv"))
