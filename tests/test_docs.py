"""The README and the pages of docs/: what they show runs, what they name is there, and the site builds."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from benchmarks import whole_nets
from lightning_modules import build_net
from tests.commands import CONFIGS, DIGITS, QUIET, tnlayers
from tests.processes import HANGING
from tests.tolerances import EXACT, FLOAT64
from tnlayers import (
    Factorization,
    LayerSpec,
    ParamsKept,
    fraction_kept,
    kinds_table,
    methods_table,
    rules_from_plain,
    summarize,
)
from tnlayers import __all__ as PUBLIC
from tnlayers.geometry import Geometry

ROOT = Path(__file__).parent.parent
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md")), ROOT / "results/README.md"]
LINKING = [*PAGES, ROOT / "CHANGELOG.md"]

CLASSES = [f"class{number}" for number in range(10)]
# What makes a page's commands take seconds: a small network, few pictures, few figures.
SMALL = {"torchvision/resnet18": "resnet20", "224": "32"}
SMALLER = ["--data.batch_size", "8", *QUIET]
ONE_BATCH = [f"--trainer.limit_{part}_batches=1" for part in ("train", "val")]
STUDIED = ["--protocol.losses=[0.5]", "--protocol.retrain=[0.5]", "--protocol.epochs=0", "--protocol.layers=conv[34]"]
FEW = {
    "compress": SMALLER,
    "report": ["--batch", "1"],
    "fit": [*SMALLER, *ONE_BATCH, "--trainer.max_epochs", "2"],
    "study": [*SMALLER, *STUDIED],
}
# Commands of which only the options are checked: what is in them, and why they are not run.
PARSED = {
    "--data.download true": "fetches pictures",
    "--trainer.devices 4": "needs four devices",
    "logger/wandb": "looks for a network; tests/test_wandb.py has such runs",
    "caffenet": "has 62 million weights",
    "--model.init decompose": "fits a generator, which takes long",
    "cifar10_resnet20_study": "studies 20 layers",
    "--out runs/look": "studies 20 layers",
    "compress.md: compress -c data/folders": "is what the README runs",
    "cifar10_resnet20_stages": "truncates ResNet-20 five times; tests/test_rank_schedule.py has such runs",
    "--out runs/further": "measures ResNet-20 once more",
}
# These go on from what one of those would have written.
AFTER_PARSED = ("-c runs/study", "compress.md: fit -c runs/mine", "compress.md: test -c runs/logs")
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each, in order."""
    return [(language, textwrap.dedent(text)) for _, language, text in BLOCK.findall(page.read_text(encoding="utf-8"))]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files in place of those that the pages name."""
    folder = tmp_path_factory.mktemp("docs")
    draw = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 2)):
        for name in CLASSES:
            (pictures := folder / "pictures" / part / name).mkdir(parents=True)
            for number in range(count):
                Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(pictures / f"{number}.png")
    (folder / "data").mkdir()
    (folder / "data/cifar10-png").symlink_to(folder / "pictures")
    weights = build_net("resnet20", num_classes=10, input_shape=(3, 32, 32)).state_dict()
    published = {f"module.{key}": value for key, value in weights.items() if "num_batches" not in key}
    torch.save({"state_dict": published}, folder / "resnet20-12fca82f.th")
    torch.save(weights, folder / "mine.pt")
    return folder


@pytest.fixture
def here(stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, which has the stand-ins."""
    for path in stand_ins.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def run_python(page: Path) -> dict[str, Any]:
    """Runs a page's Python, in order and in one namespace; returns the names."""
    names: dict[str, Any] = {"__name__": "channelsvd"}  # the module that one of the pages tells its readers to write
    for language, text in blocks(page):
        if language == "python":
            if file := re.match(r'"""(\w+\.py)', text):
                Path(file[1]).write_text(text)
            # The stand-in of mine.pt is of a smaller network, which the commands are given.
            exec(text.replace('"mine.pt"', '"saved.pt"').replace("torch.zeros(128,", "torch.zeros(8,"), names)
    return names


def run_yaml(text: str) -> None:
    """A configuration: its options exist, and its rules are understood."""
    rules_from_plain(yaml.safe_load(text).get("model", {}).get("rules", []))
    Path("block.yaml").write_text(text)
    parse(["fit", *DIGITS, "-c", "block.yaml", "--print_config"])


def parse(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        tnlayers(*arguments)
    assert exit_.value.code == 0, arguments


def run_tnlayers(page: Path, arguments: list[str]) -> None:
    """A command as a page has it, with small values; or its options alone."""
    line = f"{page.name}: {' '.join(arguments)}"
    if any(part in line for part in AFTER_PARSED):
        return
    if any(part in line for part in PARSED):
        arguments = [*arguments, "--print_config"]
    if arguments[-1] == "--print_config":
        return parse(arguments)
    few = [] if "--help" in arguments else FEW.get(arguments[0], [])
    if "--model" in arguments:  # a class of the page's own, and its data
        few = [*QUIET, *ONE_BATCH]
    assert tnlayers(*[SMALL.get(argument, argument) for argument in arguments], *few) == 0, line


def run_shell(page: Path, text: str) -> None:
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        called = [place for place, word in enumerate(words) if word in ("tnlayers", "lightning_modules.cli")]
        if called:
            run_tnlayers(page, words[called[0] + 1 :])
        elif words:
            assert OTHERS[words[0]](words[1:]), line


OTHERS: dict[str, Callable[[list[str]], object]] = {
    "make": lambda targets: all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in targets),
    "pip": lambda arguments: arguments in (["install", "."], ["install", "torchcrepe"]),
    "python": lambda arguments: (
        IS_PYTHON[arguments[0]](arguments[1]) if arguments[0] in IS_PYTHON else (ROOT / arguments[0]).is_file()
    ),
}
IS_PYTHON: dict[str, Callable[[str], object]] = {
    "-c": lambda text: compile(text, "a block", "exec"),
    "-m": importlib.util.find_spec,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # of networks this small
@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_what_a_page_shows_runs(page: Path, here: Path) -> None:
    run_python(page)
    for language, text in blocks(page):
        assert language in ("python", "yaml", "bash"), f"a block of {language!r} would not be tested"
        if language == "yaml":
            run_yaml(text)
        elif language == "bash":
            run_shell(page, text)


@pytest.mark.data
def test_the_main_job(here: Path, resnet20_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "resnet20-12fca82f.th").unlink()
    (here / "resnet20-12fca82f.th").symlink_to(resnet20_checkpoint)
    names = run_python(DOCS / "python.md")
    assert "97 entries matched, prefix 'module.' taken off" in capsys.readouterr().out
    kept = summarize(names["net"], names["example"], measure=False).totals.macs_kept
    assert 0.49 <= kept <= 0.51  # the first layer and the classifier are outside of the budget
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(names["again"].eval()(x), names["net"].eval()(x), **EXACT)
    assert names["conv"].rank == (16, 8)
    assert type(names["dense_conv"]) is nn.Conv2d


def test_truncating_without_lightning(here: Path) -> None:
    assert fraction_kept(run_python(DOCS / "rank-schedule.md")["net"], ParamsKept) <= 0.3


def test_a_method_is_one_file(here: Path) -> None:
    """The closed form is the optimum: its error is what the SVD of the same unfolding discards."""
    method: Callable[[int], Factorization] = run_python(DOCS / "add-a-method.md")["ChannelSVD"]
    weight = torch.randn(12, 8, 3, 3, dtype=torch.float64)
    for rank in (1, 5, 12):
        factors, error = LayerSpec(Geometry(1, (12, 8, 3, 3)), method(rank)).decompose(weight)
        assert error**2 == pytest.approx(method(rank).error_estimate(weight)((rank,)), abs=1e-12)
    assert method(12).max_ranks((12, 8, 3, 3)) == (12,)
    torch.testing.assert_close(method(12).network((12, 8, 3, 3)).reconstruct(factors), weight, **FLOAT64)


def test_the_table_of_methods_is_the_codes() -> None:
    page = README.parent / "docs/methods.md"
    tables = ((README, "kinds", kinds_table()), (page, "kinds", kinds_table()), (page, "methods", methods_table()))
    for path, mark, table in tables:
        assert printed_table(path, mark) == table, f"paste the output of tnlayers.{mark}_table() into {path}"


def test_the_table_of_whole_nets_is_that_of_its_file() -> None:
    """All nets are there and within their budget, and what the report says is what torch counted."""
    rows = json.loads(whole_nets.JSON.read_text(encoding="utf-8"))["rows"]
    assert list(rows) == [f"{net}, {method}" for net, method in whole_nets.ROWS]
    assert printed_table(DOCS / "whole-nets.md", "whole nets") == whole_nets.table(rows)
    for row in rows.values():
        assert 0.49 <= row["params"][1] / row["params"][0] <= 0.5
        assert row["macs"] == row["macs_of_the_report"]


def printed_table(path: Path, mark: str) -> str:
    printed = re.search(rf"<!-- {mark}.*?-->\n(.*?)\n<!--", path.read_text(encoding="utf-8"), re.DOTALL)
    assert printed, f"{path} has no table of {mark}"
    return printed[1]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as MkDocs and GitHub make them."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKING, ids=[str(page.relative_to(ROOT)) for page in LINKING])
def test_what_a_page_names_is_there(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target or path.startswith("api/"):  # pages that MkDocs makes
            continue
        linked = page.parent / path if path else page
        assert linked.is_file(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name} links to {target}"
    if page.name == "CHANGELOG.md":
        return  # it may name what was there once
    for name in re.findall(r"`(?:-c )?((?:data|net|rules|logger|experiment)/[a-z0-9_]+)`", text):
        assert (CONFIGS / f"{name}.yaml").is_file(), f"{page.name} names the configuration {name}"
    for path in re.findall(r"`((?:tnlayers|lightning_modules|tests|benchmarks|notebooks|results)/[\w./]*)`", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
    for module in re.findall(r"`(?:python -m )((?:benchmarks|results)\.\w+)", text):
        assert importlib.util.find_spec(module), f"{page.name} names {module}"


def test_options_in_the_text_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["fit", "--help"],
        ["study", "--help"],
        ["compress", "--help"],
        ["fit", "--data.help=lightning_modules.data.CIFAR10"],
        ["fit", "--model.optimizer.help=torch.optim.AdamW"],
    ):
        parse(arguments)
    known = set(re.findall(r"--[\w.]+", capsys.readouterr().out))
    for page in PAGES:
        spans = " ".join(re.findall(r"`[^`]*`", BLOCK.sub("", page.read_text(encoding="utf-8"))))
        named = set(re.findall(r"--\w+\.[\w.]*\w|--ckpt_path|--checkpoint|--out", spans))
        assert named <= known, f"{page.name} names {named - known}"


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANGING, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    for name in PUBLIC:
        page = (tmp_path / f"api/tnlayers.{name}/index.html").read_text(encoding="utf-8")
        assert f'<h1 id="tnlayers.{name}"' in page
