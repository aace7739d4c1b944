"""Every YAML file under configs/ parses, and every rule in one finds its layers."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_modules.classifier import ImageClassifier
from tests.commands import CONFIGS, tnlayers
from tnlayers import tensorize

FILES = sorted(CONFIGS.rglob("*.yaml"))
# The nets that a rules file alone is meant for.
CNN4, RESNET20 = ("cnn4", (1, 8, 8)), ("resnet20", (3, 32, 32))
RESOLVED = [
    ("experiment/digits.yaml", *CNN4),
    *((f"experiment/{name}.yaml", *RESNET20) for name in ("cifar10_resnet20", "cifar10_resnet20_stages")),
    *(
        (f"rules/{name}.yaml", *CNN4)
        for name in ("dense", "tucker", "cp", "mps", "tt", "lowrank", "ttconv", "adtn", "svd")
    ),
    *((f"rules/{name}.yaml", *RESNET20) for name in ("dense", "tucker", "mps", "lowrank", "ttconv")),
    *((f"rules/{name}.yaml", *RESNET20) for name in ("cp_half_macs", "lowrank_half_macs", "ttconv_30_percent")),
    *((f"rules/{net}_tt.yaml", net, (3, 32, 32)) for net in ("garipov_conv", "garipov_conv_fc")),
    ("rules/garipov_conv_fc_tt_small.yaml", "garipov_conv_fc", (3, 32, 32)),
    *((f"rules/{net}_lowrank.yaml", net, (3, 32, 32)) for net in ("tai_cnn", "tai_nin")),
    ("rules/caffenet_lowrank.yaml", "caffenet", (3, 227, 227)),
    ("rules/vgg16_cifar_adtn.yaml", "vgg16_cifar", (3, 32, 32)),
]


def content(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def is_part(part: Any, whole: Any) -> bool:
    """Whether every value of a file is in the configuration that was parsed from it."""
    if isinstance(part, dict):
        return all(key in whole and is_part(value, whole[key]) for key, value in part.items())
    return part == whole or str(whole).endswith(f".{part}")


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(CONFIGS)) for path in FILES])
def test_parses(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits = CONFIGS / "data/digits.yaml"
    with pytest.raises(SystemExit) as exit_:
        tnlayers("fit", "-c", digits, "-c", path, "--print_config")
    assert exit_.value.code == 0
    assert is_part(content(path), yaml.safe_load(capsys.readouterr().out))


@pytest.mark.parametrize(
    "named", [["-c", "data/digits.yaml", "--config=net/resnet20"], ["-c=data/digits.yaml", "-cnet/resnet20"]]
)
def test_found_by_name_from_any_folder(
    named: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of the user's comes first."""
    monkeypatch.chdir(tmp_path)
    for batch_size in (64, 7):
        with pytest.raises(SystemExit) as exit_:
            tnlayers("fit", *named, "--print_config")
        assert exit_.value.code == 0
        found = yaml.safe_load(capsys.readouterr().out)
        assert (found["data"]["init_args"]["batch_size"], found["model"]["net"]) == (batch_size, "resnet20")
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data/digits.yaml").write_text(
            (CONFIGS / "data/digits.yaml").read_text().replace("batch_size: 64", "batch_size: 7")
        )


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    """Each has a sentence that says what it is for; one alone is printed as it is."""
    assert tnlayers("configs") == 0
    lines = capsys.readouterr().out.splitlines()
    named = dict(line.split(maxsplit=1) for line in lines if line.startswith("  "))
    assert named.keys() == {str(path.relative_to(CONFIGS).with_suffix("")) for path in FILES}
    assert [line for line in lines if not line.startswith("  ")] == [
        "data:",
        "experiment:",
        "logger:",
        "net:",
        "rules:",
    ]
    assert tnlayers("configs", "experiment/digits") == 0
    assert capsys.readouterr().out == (CONFIGS / "experiment/digits.yaml").read_text()


def test_no_path_of_the_repository_is_in_one() -> None:
    for path in FILES:
        assert not re.search(r"configs/|results/|\.\./|runs/\w+/", path.read_text()), path


def test_every_file_with_rules_is_a_case() -> None:
    with_rules = {str(path.relative_to(CONFIGS)) for path in FILES if "rules" in content(path).get("model", {})}
    assert with_rules == {name for name, *_ in RESOLVED}


@pytest.mark.filterwarnings("ignore:ADTN. .* leave a relative error")
@pytest.mark.parametrize(("name", "net", "input_shape"), RESOLVED, ids=[f"{case[0]}-{case[1]}" for case in RESOLVED])
def test_rules_resolve(name: str, net: str, input_shape: tuple[int, int, int]) -> None:
    options = content(CONFIGS / name)["model"]
    assert options.get("net", net) == net
    model = ImageClassifier(**{"net": net, "input_shape": input_shape, **options})
    resolved = model.resolve(model.hparams["init"])
    tensorize(model.net, resolved, init=model.hparams["init"])
    methods = {rule["method"] for rule in options["rules"]} - {"dense"}
    assert {type(rule.factorization).__name__ for rule in resolved if rule.factorization} == methods
    num_dense = sum(parameter.numel() for parameter in model._build().parameters())
    num_ours = sum(parameter.numel() for parameter in model.net.parameters())
    assert (num_ours < num_dense) == bool(methods)
