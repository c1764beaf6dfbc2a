"""The page: whole in itself, true to the summary, harmless whatever a run is called, and written in one step."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

import rarefy.report
from rarefy.report import load, page, plots, wording
from rarefy.report.page import render

pytestmark = pytest.mark.slow

MakeRun = Callable[..., Path]


class Page(HTMLParser):
    """The tags of a page, in order, with their attributes, its text outside <style>, and the tags left open."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def html(sparse_run: Path, dense_run: Path) -> str:
    return render(load(sparse_run), load(dense_run))


@pytest.fixture(scope="module")
def large(large_run: Path) -> str:
    return render(load(large_run))


def test_the_page_needs_nothing_else(html: str, large: str) -> None:
    for text in (html, large):
        parsed = Page(text)
        assert parsed.open == []
        assert text.lstrip().startswith("<!DOCTYPE html>")
        assert "http:" not in text
        assert "https:" not in text
        assert "@import" not in text
        assert not {"link", "script", "img", "iframe", "object", "base"} & {tag for tag, _ in parsed.tags}
        for _, attributes in parsed.tags:
            for key, value in attributes.items():
                if key in ("src", "href", "xlink:href"):
                    assert (value or "").startswith("#")
        assert all(reference.startswith("#") for reference in re.findall(r"url\(([^)]*)\)", text))


def test_the_page_is_small(html: str, large: str) -> None:
    assert len(html.encode()) < 600_000
    assert len(large.encode()) < 1_000_000


def test_ids_are_of_one_figure_each(html: str) -> None:
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_every_figure_and_table_can_be_read_aloud(html: str) -> None:
    parsed = Page(html)
    drawn = parsed.all("svg")
    assert len(drawn) == 6 + 2 + plots.HISTOGRAMS
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in drawn)
    assert all(cell["scope"] in ("row", "col") for cell in parsed.all("th"))
    assert parsed.all("html")[0]["lang"] == "en"


def test_the_numbers_are_those_of_the_summary(html: str, sparse_run: Path, dense_run: Path) -> None:
    text = Page(html).text.replace("\u00a0", " ")
    said = json.loads((sparse_run / "summary.json").read_text())
    dense = json.loads((dense_run / "summary.json").read_text())
    difference = 100 * (said["test_accuracy"] - dense["test_accuracy"])
    assert abs(difference) > 0.05
    headline = (
        f"{100 * said['sparsity']:.1f} % of the weights are zero, "
        f"{100 * said['inference_flops_ratio']:.1f} % of the inference FLOPs remain, "
        f"{100 * said['test_accuracy']:.1f} % test accuracy, "
        f"{abs(difference):.1f} points {'above' if difference > 0 else 'below'} dense."
    )
    assert headline in text
    assert f"{100 * said['training_flops_ratio']:.1f} %" in text
    assert f"{said['nonzeros']:,}" in text
    assert "6 min 05 s" in text
    for layer in said["layers"]:
        row = f"{layer['parameters']:,}{layer['nonzeros']:,}{100 * layer['density']:.1f} %"
        assert row in text
        assert f"{layer['dense_flops']:,}{layer['inference_flops']:,}" in text
    assert f"Everything else1,0001,000{0}" in text
    assert f"Whole network{said['parameters']:,}{said['nonzeros']:,}" in text
    assert f"{said['dense_flops']:,}{said['inference_flops']:,}" in text


def test_the_comparison_has_both_runs(html: str, sparse_run: Path, dense_run: Path) -> None:
    text = Page(html).text.replace("\u00a0", " ")
    said = json.loads((sparse_run / "summary.json").read_text())
    dense = json.loads((dense_run / "summary.json").read_text())
    assert "Compared with the dense run" in text
    ratio = said["nonzeros"] / dense["nonzeros"]
    assert f"Parameters left{said['nonzeros']:,}{dense['nonzeros']:,}\u00d7 {ratio:.3g}" in text
    assert "6 min 05 s5 min 21 s\u00d7 1.14" in text
    assert "The recipes also differ in 1 setting" in text  # the seed
    assert "not measured" in text
    assert "One multiply-accumulate is one FLOP" in text


def test_recipe_environment_and_command_are_there(html: str, sparse_run: Path) -> None:
    text = Page(html).text
    assert "rarefy train recipes/autosparse-90.yaml" in text
    assert "a CPU of 16 cores" in text
    assert re.sub(r"\s+", " ", (sparse_run / "recipe.yaml").read_text()) in text


def test_54_layers_are_all_shown_and_the_12_largest_drawn(large: str, large_run: Path) -> None:
    text = Page(large).text
    assert "The 12 largest of 54 layers." in text
    for layer in json.loads((large_run / "summary.json").read_text())["layers"]:
        assert layer["name"] in text
    heights = [float((svg["viewbox"] or "").split()[3]) for svg in Page(large).all("svg")]
    assert max(heights) > 800  # the bars keep their height


HOSTILE = "</title><script>alert(1)</script>\" onload='x' $\\frac$ & --> \u4e2d \x07 _"


def test_whatever_a_run_is_called_is_text(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(
        tmp_path / "run", model="small", name=HOSTILE, rename={"conv1": HOSTILE, "fc": "_#3f7fd6 1.23456"}, epochs=2
    )
    parsed = Page(render(load(folder), load(folder)))
    assert parsed.open == []
    assert not parsed.all("script")
    assert not any(key.startswith("on") for _, attributes in parsed.tags for key in attributes)
    assert HOSTILE in parsed.text
    assert "_#3f7fd6 1.23456" in parsed.text
    assert "var(" not in parsed.text


def test_an_unfinished_run_says_so(make_run: MakeRun, dense_run: Path, tmp_path: Path) -> None:
    text = Page(render(load(make_run(tmp_path / "run", finished=False)), load(dense_run))).text.replace("\u00a0", " ")
    assert "Unfinished, at epoch 15.0 of 30: 90" in text
    assert "below dense" not in text  # half a run is not compared with a whole one
    assert "Compared with" not in text
    assert "so far" in text


def test_an_unfinished_baseline_is_named_as_such(make_run: MakeRun, small_run: Path, tmp_path: Path) -> None:
    half = make_run(tmp_path / "half", model="small", dense=True, finished=False)
    assert "dense (unfinished)" in render(load(small_run), load(half))


def test_a_baseline_may_itself_be_sparse(small_run: Path, sparse_run: Path) -> None:
    assert "Compared with autosparse-90" in render(load(small_run), load(sparse_run))


def test_a_dense_run_has_nothing_about_sparsity(dense_run: Path) -> None:
    parsed = Page(render(load(dense_run)))
    assert "A dense run: " in parsed.text
    assert len(parsed.all("svg")) == 3
    for word in ("zero,", "Threshold", "Alpha", "target"):
        assert word not in parsed.text


def test_a_run_with_little_in_it(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", model="small", dense=True, epochs=1)
    record = {"event": "train", "step": 1, "epoch": 0.1, "loss": 2.3}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    (folder / "summary.json").write_text("{}")
    (folder / "environment.json").unlink()
    assert "A dense run: nothing measured yet." in render(load(folder))
    (folder / "summary.json").unlink()
    assert "Unfinished, at epoch 0.1 of 1: nothing measured yet." in render(load(folder))


def test_attention_is_drawn_cell_by_cell(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", model="small", dense=True)
    assert "looked at" not in render(load(folder))
    weights = [[0.9, 0.1, 0.0], [0.004, 0.2, 0.8]]
    pieces = {"source": ["\u2581<b>", "og", "</s>"], "target": ["\u2581Hund", "</s>"], "weights": weights}
    (folder / "attention.json").write_text(json.dumps({"sentences": [pieces]}))
    html = render(load(folder))
    shown = Page(html)
    assert not shown.open
    assert "What the decoder looked at" in shown.text
    assert "Sentence 1<" in html
    (drawn,) = (tag for tag in shown.all("svg") if "Attention" in (tag["aria-label"] or ""))
    alt = "Attention of a translation: \u2581Hund looks most at \u2581<b>; </s> looks most at </s>."
    assert drawn["aria-label"] == alt
    alphas = [float(alpha) for alpha in re.findall(r"fill: var\(--run, #3f7fd6\); opacity: ([\d.]+)", html)]
    assert alphas == pytest.approx([0.9, 0.1, 0.2, 0.8])
    for word in ("\u2581<b>", "og", "\u2581Hund"):
        assert word in shown.text


def test_a_diverged_run_is_shown(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", model="small", epochs=2)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in lines[2:]:
        record.update({key: float("nan") for key in ("loss", "test_loss", "test_accuracy") if key in record})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    render(load(folder))


@pytest.mark.parametrize(
    ("kind", "target", "said"),
    [
        ("sparsity", 0.9, "points beyond the target 90.0 %"),
        ("sparsity", 0.95, "points short of the target 95.0 %"),
        ("flops", 0.08, "points short of the target 8.0 %"),
        ("sparsity", None, "target 91.2 %, met"),
    ],
)
def test_the_target_is_judged(sparse_run: Path, tmp_path: Path, kind: str, target: float | None, said: str) -> None:
    folder = Path(shutil.copytree(sparse_run, tmp_path / "run"))
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"target_kind": kind, "target": summary["sparsity"] if target is None else target}
    (folder / "summary.json").write_text(json.dumps(summary))
    assert said in wording.verdict(load(folder), kind).replace("\u00a0", " ")


def test_write_puts_the_page_into_the_run(small_run: Path, dense_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small_run, tmp_path / "run"))
    path = rarefy.report.write(folder, baseline=dense_run)
    assert path == folder / "report.html"
    other = rarefy.report.write(folder, baseline=dense_run, output=tmp_path / "other.html")
    assert other == tmp_path / "other.html"
    assert path.read_bytes() == other.read_bytes()  # the same run gives the same page
    assert sorted(file.name for file in tmp_path.iterdir()) == ["other.html", "run"]


@pytest.mark.parametrize(("owner", "name"), [(page, "render"), (Path, "replace")])
def test_an_error_leaves_the_older_page(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str
) -> None:
    older = tmp_path / "report.html"
    older.write_text("older")

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(OSError, match="no space left"):
        rarefy.report.write(small_run, output=older)
    assert older.read_text() == "older"
    assert list(tmp_path.iterdir()) == [older]


def test_the_users_plotting_settings_change_nothing(make_run: MakeRun, tmp_path: Path) -> None:
    import matplotlib

    run = load(make_run(tmp_path / "run", model="small", epochs=2))
    before = render(run)
    with matplotlib.rc_context({"font.size": 30, "axes.grid": False, "svg.fonttype": "path"}):
        assert render(run) == before
        assert matplotlib.rcParams["font.size"] == 30


def test_without_the_extra_the_error_says_what_to_install() -> None:
    code = "import sys; sys.modules['jinja2'] = None\nimport rarefy.report"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: rarefy.report needs jinja2: pip install 'rarefy[train]'" in done.stderr


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (wording.percent(0.9), "90.0 %"),
        (wording.percent(0.9997), "99.97 %"),
        (wording.percent(1.0), "100.0 %"),
        (wording.percent(0.00004), "0.004 %"),
        (wording.percent(None), "\u2013"),
        (wording.percent(float("nan")), "not a number"),
        (wording.short(40_813_184), "40.8 M"),
        (wording.short(999_900), "1 M"),
        (wording.short(640), "640"),
        (wording.duration(3725), "1 h 02 min"),
        (wording.duration(59.96), "1 min 00 s"),
        (wording.duration(7.25), "7.2 s"),
        (wording.points(-0.004), "\u22120.4 points"),
        (wording.points(0.0001), "0.0 points"),
        (wording.against(-0.004, "dense"), "0.4 points below dense"),
        (wording.against(0.0002, "dense"), "within 0.1 points of dense"),
    ],
)
def test_how_numbers_are_said(said: str, expected: str) -> None:
    assert said.replace("\u00a0", " ") == expected
