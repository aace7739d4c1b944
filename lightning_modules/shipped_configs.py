"""The configurations that come with the package, found by name from any folder: `-c experiment/digits`."""

import re
from difflib import get_close_matches
from pathlib import Path

from tnlayers.errors import UserError

__all__ = ["config_names", "config_path", "description", "is_file"]

_PACKAGED = Path(__file__).with_name("configs")
# An editable install has them at the top of the repository.
_FOLDER = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[1] / "configs"


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
    if is_file(Path(name)):
        return Path(name)
    if bare in known:
        return _FOLDER / f"{bare}.yaml"
    spelt = {each.rpartition("/")[2]: each for each in known} | {each: each for each in known}
    near = get_close_matches(bare, spelt, n=1)
    hint = f"did you mean {spelt[near[0]]!r}?" if near else "`tnlayers configs` lists the names of those that there are"
    raise UserError(f"there is no configuration {name!r}, neither a file nor one of the package: {hint}")


def description(name: str) -> str:
    """Returns the first sentence of the comment that a configuration begins with; empty where it has none."""
    lines = []
    for line in (_FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return re.split(r"\.(?: (?=[A-Z`])|$)", " ".join(lines))[0]


def is_file(path: Path) -> bool:
    """Returns whether a path that a user gave is a file's."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with a null byte
        return False
