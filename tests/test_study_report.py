"""The report of a truncation study: what it says is what the rows say, and the same rows give the same bytes."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image

from lightning_modules.study.depth import rank_correlation
from lightning_modules.study.findings import Findings
from lightning_modules.study.report.pictures import study_pictures
from lightning_modules.study.report.plots import STYLES, Level, Line, small_multiples
from lightning_modules.study.report.rendering import summary, write_report
from lightning_modules.study.rows import (
    Joint,
    Layer,
    Protocol,
    Recommendation,
    Retrained,
    Row,
    Single,
    Study,
    row_from_plain,
    row_to_plain,
)
from tnlayers import rules_from_plain

NAMES = ("conv1", "conv2", "conv3")
TRAINING = {"pictures": 1_000, "teacher": "the dense net", "distill_weight": 0.9}
STUDY = Study("net", "dense.ckpt", "0" * 64, "Pictures", 400, 10, 0.9, 0.3, Protocol(), TRAINING)
LAYERS = [Layer(name, (8, 8, 3, 3), 576, 576, {"o": 8, "i": 8}, {"o": 1.5, "i": 2.0}) for name in NAMES]
RULES = (
    {"pattern": "conv1", "method": "dense", "reason": "nothing is tolerated"},
    {"pattern": "conv2", "method": "Tucker", "rank": [4, 4]},
)


def single(layer: str, cuts: str, bonds: tuple[int, ...], eps: float, accuracy: float, control: str = "") -> Single:
    return Single(layer, tuple(cuts), bonds, control, eps, 0.0, accuracy, 0.5)


def curve(layer: str, cut: str, tolerated: float) -> list[Row]:
    """Bond dimensions 6, 4 and 2 at norm losses up to 0.8, whose accuracy breaks down past `tolerated`."""
    losses = {6: 0.2, 4: 0.5, 2: 0.8}
    return [single(layer, cut, (bond,), eps, 0.895 if eps <= tolerated else 0.4) for bond, eps in losses.items()]


def rising(*order: int) -> list[Row]:
    """Six layers of which each tolerates a norm loss that is its place in the order."""
    return [single(layer.name, "o", (2,), 0.1 + 0.1 * place, 0.9) for layer, place in zip(SIX, order, strict=True)]


def by_depth(*tolerated: float) -> list[Row]:
    return [row for name, eps in zip(NAMES, tolerated, strict=True) for cut in "oi" for row in curve(name, cut, eps)]


BASE: list[Row] = [STUDY, *LAYERS, *by_depth(0.2, 0.5, 0.8)]
SEVERAL = single("conv2", "oi", (4, 4), 0.6, 0.892)
ERROR = single("conv2", "o", (4,), 0.5, 0.7, "random error")
WEIGHT = single("conv2", "o", (4,), 0.5, 0.1, "random weight")
JOINT = Joint(("o", "i"), 0.3, dict.fromkeys(NAMES, (4, 4)), 0.35, 0.06, 0.891, 0.5)
FACTORS = Retrained(("o", "i"), 0.7, "factors", (0.2, 0.6, 0.895), 0.3, 0.4)
DENSE = Retrained(("o", "i"), 0.7, "dense", (0.2, 0.6, 0.7), 0.3, 0.4)
RECOMMENDATION = Recommendation(0.01, RULES, (0.85, 0.905), 0.48, 0.5)
LARGER = Recommendation(0.005, (RULES[0], RULES[1] | {"rank": [6, 6]}), (0.87, 0.91), 0.7, 0.8)
NOTHING = Recommendation(0, RULES[:1], (0.9, 0.9), 1, 1)
SMALLER = Recommendation(0.02, RULES[1:], (0.5, 0.88), 0.2, 0.3)
UNTRUNCATED = Retrained((), 0, "dense", (0.9, 0.91, 0.915), 1, 1)
WHOLE = [*BASE, SEVERAL, ERROR, WEIGHT, JOINT, UNTRUNCATED, FACTORS, DENSE, RECOMMENDATION]
SIX = [replace(LAYERS[0], name=f"layer{place}") for place in range(6)]


def lost(row: Single | Joint | Retrained, accuracy: float) -> Row:
    """The row with another accuracy, of a retrained one the last."""
    plain = row_to_plain(row)
    plain["accuracy"] = [*row.accuracy[:-1], accuracy] if isinstance(row, Retrained) else accuracy
    return row_from_plain(json.loads(json.dumps(plain)))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (BASE, "Tolerated means at most 1 point lost, 4 of these pictures."),
        ([replace(STUDY, pictures=360)], "Tolerated means at most 1 point lost, 3 of these pictures."),
        (BASE, "accuracy of 90.00% on 400 test pictures (Pictures) (standard error 1.5 points)"),
        (BASE, "most in conv3 (0.80), least in conv1 (0.20)"),
        (BASE, "Deep layers tolerate more norm loss than the first: averaged over 2 cuts, 0.20 in conv1 and 0.80 in the last, conv3"),
        (BASE, "; 3 layers are too few for a trend (rank correlation +1.00)"),
        ([STUDY, *SIX, *rising(0, 1, 2, 3, 5, 4)], "over all 6 layers it is rising with depth (rank correlation +0.94)"),
        ([STUDY, *SIX, *rising(5, 4, 3, 2, 1, 0)], "falling with depth (rank correlation -1.00)"),
        ([STUDY, *SIX, *rising(0, 3, 1, 5, 2, 4)], "there is no clear trend (rank correlation +0.60)"),
        ([STUDY, *LAYERS, *curve("conv1", "o", 0.2), *curve("conv2", "o", 0.5)], "0.20 in conv1 and 0.50 in the last, conv2."),
        ([STUDY, *LAYERS, *by_depth(0.8, 0.5, 0.2)], "Deep layers tolerate less norm loss than the first"),
        ([STUDY, *LAYERS, *by_depth(0.5, 0.2, 0.5)], "Deep layers tolerate about as much norm loss as the first"),
        ([STUDY, *LAYERS, *by_depth(0.5, 0.5, 0.5)], "all layers tolerate the same"),
        ([STUDY, *LAYERS, *curve("conv1", "o", 0.5)], "2 layers are not measured yet"),
        ([STUDY, *LAYERS, *curve("conv1", "o", 0.5), RECOMMENDATION], "the norm loss tolerated is 0.50 in the mean."),
        ([*BASE, SEVERAL], "1 are tolerated; the largest norm loss of them is 0.60, by conv2 as Tucker-2 (o 4, i 4) (0.8 points lost)"),
        ([*BASE, lost(SEVERAL, 0.905)], "(0.5 points gained)"),
        ([*BASE, lost(SEVERAL, 0.88)], "Of 1 truncations of several cuts of one layer at once none is tolerated"),
        ([*BASE, JOINT], "the largest norm loss of them is 0.35, by Tucker-2 (0.9 points lost)"),
        ([*BASE, lost(JOINT, 0.5)], "Of 1 truncations of all layers at once none is tolerated"),
        ([*BASE, ERROR], "the control keeps 19.5 points less in the mean, so the directions that a truncation takes matter less"),
        ([*BASE, lost(ERROR, 0.95)], "a truncation does more harm than other errors of its size"),
        ([*BASE, lost(ERROR, 0.895)], "a truncation does about as much harm as other errors of its size"),
        ([*BASE, WEIGHT], "1 are tolerated and of their controls 0; the control keeps 79.5 points less"),
        ([*BASE, lost(WEIGHT, 0.9)], "what was trained in these layers does not matter"),
        ([*BASE, FACTORS, DENSE], "After 2 epochs over 1,000 pictures what had lost too much is within the tolerance again in 0 of 1"),
        ([*BASE, FACTORS, DENSE], "1 of 1 as factors; the deepest fall that is undone is Tucker-2 of all layers at up to 0.7 a cut, 20.0%"),
        ([*BASE, lost(FACTORS, 0.8), DENSE], "the nearest is Tucker-2 of all layers at up to 0.7 a cut, 20.0% before and 80.0%"),
        ([*BASE, UNTRUNCATED, FACTORS, DENSE], ". The dense net itself, trained on likewise, ends at 91.5% (1.5 points gained)."),
        (WHOLE, "48% of the parameters and 50% of the MACs kept; accuracy 85.00% right after (5 points lost), 90.50% after 1 epoch"),
        ([*WHOLE, LARGER], "Recommended: 48% of the parameters and 50% of the MACs kept"),
        ([*BASE, SMALLER, LARGER], "Recommended: 70% of the parameters and 80% of the MACs kept"),
        ([*BASE, SMALLER, NOTHING], "None is within the tolerance, and the most accurate is: 20% of the parameters and 30%"),
        ([*BASE, SMALLER], "30% of the MACs kept; accuracy 50.00% right after (40 points lost), 88.00%"),
        ([*BASE, NOTHING], "Nothing is recommended: no layer tolerates a factorization that saves."),
    ],
)  # fmt: skip
def test_sentences_say_what_the_rows_say(rows: list[Row], expected: str) -> None:
    assert expected in " ".join(summary(rows))


@pytest.mark.parametrize(
    ("accuracies", "bond", "eps"),
    [
        ((0.90, 0.895, 0.89), 2, 0.8),
        ((0.90, 0.895, 0.80), 4, 0.5),
        ((0.90, 0.80, 0.895), 6, 0.2),  # a smaller bond dimension that is tolerated again does not count
        ((0.80, 0.895, 0.895), 8, 0.0),
    ],
)
@pytest.mark.parametrize("order", [list, lambda rows: rows[::-1]])
def test_tolerated_bond(
    accuracies: tuple[float, ...], bond: int, eps: float, order: Callable[[list[Row]], list[Row]]
) -> None:
    rows: list[Row] = [
        single("conv1", "o", (size,), at, accuracy)
        for size, at, accuracy in zip((6, 4, 2), (0.2, 0.5, 0.8), accuracies, strict=True)
    ]
    measured = Findings([STUDY, *LAYERS, *order(rows)])
    assert measured.tolerated_bond(LAYERS[0], "o") == bond
    assert measured.tolerated_eps("conv1", "o") == eps
    assert measured.tolerated_bond(LAYERS[0], "i") is None


@pytest.mark.parametrize(
    ("y", "expected"), [((1, 2, 4), 1), ((4, 2, 1), -1), ((1, 2, 2), 3**0.5 / 2), ((5, 5, 5), None)]
)
def test_rank_correlation(y: tuple[float, ...], expected: float | None) -> None:
    found = rank_correlation((1, 2, 3), y)
    assert found == (None if expected is None else pytest.approx(expected))


def test_written_twice_is_the_same(tmp_path: Path) -> None:
    again = [row_from_plain(json.loads(json.dumps(row_to_plain(row)))) for row in WHOLE]
    write_report(WHOLE, tmp_path / "a")
    write_report(again, tmp_path / "b")
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    assert files.keys() >= {"report.md", "report.html", "rules.yaml"}
    plain = yaml.safe_load(files["rules.yaml"])["model"]["rules"]
    assert [rule.to_plain() for rule in rules_from_plain(plain)] == list(RULES)


def test_markdown_and_html_say_the_same(tmp_path: Path) -> None:
    write_report(WHOLE, tmp_path)
    text, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings == re.findall(r"<h2>(.*?)</h2>", page)
    assert len(headings) == 11
    assert all(sentence in text for sentence in summary(WHOLE))
    shown = re.findall(r"\]\((.*?)\)", text)
    assert len(shown) == page.count('src="data:image/png;base64,') == len(set(shown)) == 8
    assert len(re.findall(r"^\| ", text, re.MULTILINE)) == page.count("<tr>") + page.count("<table>")
    assert "<script" not in page
    assert "o|ihw" in text
    for name in shown:
        with Image.open(tmp_path / name) as picture:
            picture.load()
            assert picture.info.keys() <= {"dpi"}


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        (TRAINING, "They learn from the labels and, with a weight of 0.9, from the outputs of the dense net."),
        (TRAINING | {"distill_weight": 1.0}, "They learn from the outputs of the dense net."),
        (TRAINING | {"teacher": None, "distill_weight": 0.0}, "They learn from the labels."),
        ({"teacher": None, "distill_weight": 0.9}, "They learn from the labels."),
    ],
)
def test_the_report_says_what_is_learned_from(training: dict[str, object], expected: str, tmp_path: Path) -> None:
    write_report([replace(STUDY, training=training), *LAYERS, JOINT, FACTORS], tmp_path)
    assert expected in (tmp_path / "report.md").read_text()


def test_what_the_recommendation_rests_on(tmp_path: Path) -> None:
    """A dense layer on no truncation."""
    write_report([*WHOLE, replace(RECOMMENDATION, tolerance=0.005), LARGER], tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| conv1 | dense |  |  |  |" in text
    assert "| conv2 | Tucker | 4, 4 | 0.60 | 0.8 |" in text
    assert "Of 2 ways to factorize the whole net 2 end within the tolerance." in text


@pytest.mark.parametrize("done", [1, 1 + len(NAMES), len(BASE) - 8, len(BASE), len(WHOLE) - 2])
def test_a_study_that_is_not_finished(done: int, tmp_path: Path) -> None:
    write_report(WHOLE[:done], tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "Recommend" not in text
    assert not (tmp_path / "rules.yaml").exists()
    assert ("Accuracy against norm loss" in text) == (done > 1 + len(NAMES))


def test_rows_without_their_study(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape("without the study's own first")):
        write_report(LAYERS, tmp_path)


def test_panels_mark_what_is_tolerated() -> None:
    (figure,) = study_pictures(Findings(BASE))["single"].values()
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title().split()[0] for axes in panels] == list(NAMES)
    marked = [[line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 1] for axes in panels]
    assert marked == [[0.2, 0.2], [0.5, 0.5], [0.8, 0.8]]


@pytest.mark.parametrize(("num_layers", "pages"), [(1, [1]), (20, [20]), (21, [12, 9]), (54, [20, 20, 14])])
def test_many_layers_take_several_pages(num_layers: int, pages: list[int]) -> None:
    line = Line("o|ihw", STYLES["o"], ((0, 90), (0.5, 80)), large=1)
    panels = {f"layer{place}": [line] for place in range(num_layers)}
    figures = small_multiples({**panels, "not measured": []}, "norm loss", Level(90, 1, 10))
    assert [sum(axes.get_visible() for axes in figure.axes) for figure in figures] == pages
