"""The configurations among a command's arguments: their names become paths, and their YAML is checked before its values are.

It has to be readable, have each key once and leave no section empty: jsonargparse lets the last of two equal keys win, and an
empty section take away what earlier files and options gave.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from lightning_modules.shipped_configs import config_path, is_file
from tnlayers.errors import UserError

__all__ = ["COMMANDS", "CONFIG", "SECTIONS", "is_yaml", "options_of", "read_yaml", "with_config_paths"]

COMMANDS = ("compress", "fit", "predict", "study", "test", "validate")
"""The commands that take configurations."""
CONFIG = ("-c", "--config")
"""The two names of the option that takes a configuration."""
SECTIONS = ("autotune", "data", "model", "model.optimizer", "model_checkpoint", "protocol", "rank_schedule", "trainer")
"""The keys that always have options below them."""
_FILES = {name.rpartition(".")[2] for name in SECTIONS}
"""The keys whose value may be another file of options."""


class _Options(dict[Any, Any]):
    """The mapping of a YAML text, with the lines of its keys."""

    lines: dict[Any, int]


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Loads plain values, and refuses a key that is there twice."""

    def options(self, node: yaml.MappingNode) -> Iterator[_Options]:
        found = _Options()
        yield found  # before what is in it, which may refer to it
        found.lines = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in found.lines:
                    raise UserError(
                        f"{key.start_mark.name}, line {line}: the key {key.value!r} is there twice, at line {found.lines[key.value]} "
                        "too; leave one of them"
                    )
                found.lines[key.value] = line
        found.update(self.construct_mapping(node))


_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.options)


def options_of(arguments: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Gives each argument of a command as a value, after the option before it, or that of `--option=value`, `-c=value`, `-cvalue`."""
    before = ""
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if equals and option.startswith("--"):
            yield option, value
        elif argument.startswith(CONFIG[0]) and argument != CONFIG[0]:
            yield CONFIG[0], argument.removeprefix(CONFIG[0]).removeprefix("=")
        else:
            yield before, argument
        before = argument


def with_config_paths(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments of a command, with paths in the place of names of configurations."""
    return [
        argument.removesuffix(value) + str(config_path(value))
        if option in CONFIG and not value.startswith("{")
        else argument
        for argument, (option, value) in zip(arguments, options_of(arguments), strict=True)
    ]


def read_yaml(arguments: Sequence[str]) -> dict[str, Any]:
    """Reads the configurations among a command's arguments, the YAML files that they name, and YAML in the arguments themselves.

    Returns:
        The contents by the path, or by the text itself.

    Raises:
        UserError: one is not valid, is empty, has a key twice, or a section that has no options.
    """
    contents: dict[str, Any] = {}
    for option, value in options_of(arguments):
        if value.startswith(("{", "[")):
            _read_text(value, option, Path(), contents)
        elif option in CONFIG or (option.removeprefix("--") in SECTIONS and is_yaml(value)):
            _read_file(Path(value), contents, config=option in CONFIG)
    return contents


def is_yaml(value: str) -> bool:
    """Tells whether a value is the path of a YAML file."""
    return len(value) < 4096 and Path(value).suffix in (".yaml", ".yml", ".json")


def _read_file(path: Path, contents: dict[str, Any], *, config: bool = False) -> None:
    if not is_file(path) or str(path) in contents:
        return  # jsonargparse says so, or it is a value after all
    try:
        content = contents[str(path)] = _load(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if config:
        _check_sections(content, str(path))
    _read_named(content, str(path), path.parent, contents)


def _read_text(text: str, name: str, folder: Path, contents: dict[str, Any]) -> None:
    with suppress(yaml.YAMLError):  # a text that only looks so, or jsonargparse says what is wrong with it
        contents[text] = _load(text, name)
        _read_named(contents[text], name, folder, contents)


def _read_named(content: Any, name: str, folder: Path, contents: dict[str, Any]) -> None:
    """Reads what the values of some contents name, or are the text of."""
    for value in _texts(content, set()):
        if value.startswith("{"):
            _read_text(value, name, folder, contents)
        elif is_yaml(value):
            _read_file(folder / value, contents)


def _load(text: str, name: str) -> Any:
    stream = io.StringIO(text)
    stream.name = name  # for messages
    try:
        return yaml.load(stream, _Loader)
    except RecursionError:
        raise UserError(f"{name} is nested too deeply") from None
    except UserError:
        raise
    except ValueError as error:  # a date that is none
        raise yaml.YAMLError(str(error)) from None


def _texts(content: Any, seen: set[int]) -> Iterator[str]:
    """Gives the texts that stand where options may be in a file of their own; what an alias stands for is looked at once."""
    if id(content) in seen or not isinstance(content, (dict, list)):
        return
    seen.add(id(content))
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        if isinstance(value, str) and key in _FILES:
            yield value
        yield from _texts(value, seen)


def _check_sections(content: Any, name: str, above: str = "") -> None:
    """Refuses an empty file, and a section that is neither options nor the path of a file or class that has them."""
    if not isinstance(content, _Options) or not (content or above):
        what = "has no options" if content else "is empty"
        raise UserError(f"{name} {what}; expected lines such as 'model:' with '  net: cnn4' below, indented")
    for key, value in content.items():
        path, line = f"{above}{key}", content.lines.get(str(key))
        if not above and path in COMMANDS and isinstance(value, _Options):
            _check_sections(value, name)
        if path == "config" and value is not None:
            raise UserError(f"{name}, line {line}: a configuration names no other one; give each a -c of its own")
        if path not in SECTIONS:
            continue
        if isinstance(value, _Options):
            _check_sections(value, name, f"{path}.")
        elif not isinstance(value, str):
            what = "empty" if value is None else "no mapping"
            raise UserError(
                f"{name}, line {line}: {path!r} is {what}, which would take away what was given before; write its options below "
                f"'{key}:', indented, or leave the key out"
            )
