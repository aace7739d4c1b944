"""The configurations that come with the package, found by name from any folder: `-c experiment/digits`."""

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

from tnlayers.errors import UserError

__all__ = ["config_names", "config_path", "description", "with_config_paths"]

_PACKAGED = Path(__file__).with_name("configs")
_FOLDER = (
    _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[1] / "configs"
)  # where the repository is installed


def config_names() -> list[str]:
    """Returns the names of all configurations that come with the package, such as rules/tucker, in their order."""
    return sorted(path.relative_to(_FOLDER).with_suffix("").as_posix() for path in _FOLDER.rglob("*.yaml"))


def config_path(name: str) -> Path:
    """Returns the file of a configuration.

    Args:
        name: a file of the user's, or else the name of a configuration that comes with the package, with or without .yaml.

    Raises:
        UserError: there is neither.
    """
    bare, known = name.removesuffix(".yaml"), config_names()
    if bare in known and not _is_file(name):
        return _FOLDER / f"{bare}.yaml"
    if not _is_file(name):
        last = {each.rpartition("/")[2]: each for each in known}
        near = get_close_matches(bare, known, n=1) or [
            last[each] for each in get_close_matches(Path(bare).name, last, n=1)
        ]
        hint = f"did you mean {near[0]!r}?" if near else "`tnlayers configs` lists the names of those that there are"
        raise UserError(f"there is no configuration {name!r}, neither a file nor one of the package: {hint}")
    return Path(name)


def with_config_paths(arguments: Sequence[str]) -> Iterator[str]:
    """Gives the arguments of a command, with paths in the place of names of configurations."""
    before = ""
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if before in ("-c", "--config"):
            yield _path_or_options(argument)
        elif option == "--config" and equals:
            yield f"--config={_path_or_options(value)}"
        else:
            yield argument
        before = argument


def _path_or_options(value: str) -> str:
    return value if value.startswith("{") else str(config_path(value))


def description(name: str) -> str:
    """Returns the first sentence of the comment that a configuration begins with; empty where it has none."""
    lines = []
    for line in (_FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return re.split(r"\.(?: (?=[A-Z`])|$)", " ".join(lines))[0]


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # too long, or with a null byte
        return False
