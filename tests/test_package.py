"""What the distribution promises: its names, what importing it costs, and that the wheel works away from the repository."""

import ast
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

import pytest

import lightning_modules
import tnlayers
from tests.processes import HANGING

ROOT = Path(__file__).parent.parent
QUICK_STUDY = (
    "--protocol.layers conv4 --protocol.losses [0.5] --protocol.retrain [] --protocol.epochs 0 --protocol.pictures 50"
)


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=HANGING
    ).stdout


@pytest.mark.parametrize("package", [tnlayers, lightning_modules], ids=lambda package: package.__name__)
def test_public_names_are_sorted_and_there(package: object) -> None:
    names = package.__all__  # type: ignore[attr-defined]
    assert len(names) == len(set(names))
    assert all(getattr(package, name) is not None for name in names)


def test_the_layers_import_neither_lightning_nor_wandb() -> None:
    code = "import sys, tnlayers; print(sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = run_python(code)
    assert not any(
        f"'{name}'" in loaded for name in ("lightning", "wandb", "matplotlib", "torchvision", "torchmetrics")
    )


def test_importing_does_not_wait_for_what_is_only_needed_later() -> None:
    """TensorLy brings SciPy, and torch's counter of operations brings Triton: together they take half as long as torch."""
    code = "import sys, tnlayers; print(sorted({'tensorly', 'scipy', 'triton'} & {*sys.modules}))"
    assert run_python(code).strip() == "[]"
    code = "import sys, lightning_modules.data; print('sklearn.datasets' in sys.modules)"
    assert run_python(code).strip() == "False"


def test_importing_touches_no_global_state() -> None:
    code = (
        "import os, torch, tensorly, lightning.pytorch; e = dict(os.environ); t = torch.get_rng_state()\n"
        "import tnlayers, lightning_modules.lightning_cli, lightning_modules.quickstart\n"
        "print(e == dict(os.environ), bool((t == torch.get_rng_state()).all()), tensorly.get_backend())"
    )
    assert run_python(code).split() == ["True", "True", "numpy"]


def test_help_needs_no_torch() -> None:
    code = "import sys; from lightning_modules.cli import main; main(['--help']); print('torch' in sys.modules)"
    assert run_python(code).splitlines()[-1] == "False"


FLOORS = [
    "leaf",
    "errors",
    "files",
    "optimizers",
    "markdown",
    "contraction",
    "network",
    "roles",
    "schedule",
    "steps",
    "plan",
    "lookup",
    "cost",
    "linalg",
    "cuts",
    "ranks",
    "allocation",
    "geometry",
    "method",
    "anyof",
    "spec",
    "budget",
    "merged",
    "factorized",
    "tracing",
    "opened",
    "layers",
    "kept",
    "tuning",
    "normalisation",
    "slices",
    "features",
    "moments",
    "refitting",
    "interim",
    "healing",
    "joint",
    "methods",
    "exchange",
    "table",
    "rules",
    "reasons",
    "dense_form",
    "counting",
    "assigning",
    "settling",
    "surgery",
    "chains",
    "truncation",
    "summary",
    "state_dicts",
    "matching",
    "saved_layers",
    "checkpoints",
]
"""The modules of tnlayers, the ground floor first."""


def test_imports_run_downward_only() -> None:
    """The ground floor knows nothing of what stands on it."""
    assert set(FLOORS) == {path.stem for path in (ROOT / "tnlayers").iterdir()} - {"__init__", "__pycache__"}
    for floor, name in enumerate(FLOORS):
        above = _imports(name) & set(FLOORS[floor + 1 :])
        assert not above, f"{name} imports {above}"
        assert "lightning_modules" not in _imports(name)


def test_at_most_three_layers_of_imports_lie_between_a_method_and_tensorize() -> None:
    """A module lies one layer above the highest that it imports; nothing that `tensorize` needs imports a method."""
    layer: dict[str, int] = {}
    for name in FLOORS:
        layer[name] = 1 + max((layer[other] for other in _imports(name) & layer.keys()), default=0)
        assert "methods" not in _imports(name) - {name} or name == "exchange"  # which knows what others call them
    assert layer["surgery"] - layer["methods"] - 1 <= 3


@pytest.mark.parametrize("package", ["tnlayers", "lightning_modules"])
def test_files_and_functions_are_read_at_a_glance(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 350, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"


def _imports(name: str) -> set[str]:
    """What a module of tnlayers imports, or those of a folder: modules of tnlayers by their own names, else the packages."""
    path = ROOT / "tnlayers" / name
    files = list(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    found = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    found |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {module.removeprefix("tnlayers.").partition(".")[0] for module in found}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has the wheel and this one's dependencies, and does not see the checkout."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT],
        check=True,
        timeout=HANGING,
    )
    (wheel,) = folder.glob("tnlayers-*.whl")
    environment = folder / "environment"
    venv.create(environment, with_pip=False)
    site = next((environment / "lib").glob("python*/site-packages"))
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel],
        check=True,
        timeout=HANGING,
    )
    dependencies = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    (site / "dependencies.pth").write_text(f"{dependencies}\n")
    return environment / "bin" / "python"


def _run(python: Path, arguments: Sequence[str | Path], folder: Path) -> str:
    done = subprocess.run(
        [python, "-I", *arguments], capture_output=True, text=True, cwd=folder, timeout=HANGING, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_works_away_from_the_repository(installed: Path, tmp_path: Path) -> None:
    code = "import tnlayers, lightning_modules; print(tnlayers.__file__, lightning_modules.__file__)"
    where = _run(installed, ["-c", code], tmp_path)
    assert all(part.startswith(str(installed.parents[1])) for part in where.split())
    commands = {
        "quickstart --out run": "written     run/",
        "configs": "  experiment/digits ",
        "configs experiment/digits": "model:\n  net: cnn4\n",
        "compress -c experiment/digits --checkpoint run/dense.ckpt --out small": "retrain     tnlayers fit -c small/config.yaml",
        f"study -c experiment/digits_study --checkpoint run/dense.ckpt --out told {QUICK_STUDY}": "written     told/",
    }
    for command, said in commands.items():
        assert said in _run(installed, ["-m", "lightning_modules.cli", *command.split()], tmp_path)
    assert (tmp_path / "run/report.md").is_file()
    assert (tmp_path / "small/model.ckpt").is_file()


@pytest.mark.slow
def test_the_wheel_compresses_a_published_network_on_pictures(
    installed: Path, resnet20_checkpoint: Path, cifar10_png: Path, tmp_path: Path
) -> None:
    command = ["-m", "lightning_modules.cli", "compress", "-c", "experiment/cifar10_resnet20"]
    files = ["--data.root", cifar10_png, "--checkpoint", resnet20_checkpoint, "--out", "small"]
    assert "dense 91.64%" in _run(installed, [*command, *files], tmp_path)
    assert (tmp_path / "small/model.ckpt").is_file()
