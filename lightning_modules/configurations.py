"""The configurations among a command's arguments: their names become paths, and their YAML is checked before its values are.

It has to be readable, have each key once and leave no section empty: jsonargparse lets the last of two equal keys win, and an
empty section take away what earlier files and options gave.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import yaml

from lightning_modules.shipped_configs import config_path, is_file
from tnlayers.errors import UserError

__all__ = ["COMMANDS", "CONFIG", "SECTIONS", "check_yaml", "options_of", "with_config_paths"]

COMMANDS = ("compress", "fit", "predict", "study", "test", "validate")
"""The commands that take configurations."""
CONFIG = ("-c", "--config")
"""The two names of the option that takes a configuration."""
SECTIONS = ("data", "model", "model.optimizer", "model_checkpoint", "protocol", "rank_schedule", "trainer")
"""The keys that always have options below them."""
_FILES = {name.rpartition(".")[2] for name in SECTIONS}
"""The keys whose value may be another file of options."""
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def options_of(arguments: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Gives each argument of a command as a value, after the option before it, or that of `--option=value`."""
    before = ""
    for argument in arguments:
        option, equals, value = argument.partition("=")
        yield (option, value) if equals and option.startswith("--") else (before, argument)
        before = argument


def with_config_paths(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments of a command, with paths in the place of names of configurations."""
    return [
        argument.removesuffix(value) + str(config_path(value))
        if option in CONFIG and not value.startswith("{")
        else argument
        for argument, (option, value) in zip(arguments, options_of(arguments), strict=True)
    ]


def check_yaml(arguments: Sequence[str]) -> None:
    """Checks the configurations among a command's arguments, the YAML files that they name, and YAML in the arguments themselves.

    Raises:
        UserError: one is not valid, is empty, has a key twice, or a section that has no options.
    """
    seen: set[Path] = set()
    for option, value in options_of(arguments):
        if option in CONFIG or (option.removeprefix("--") in SECTIONS and _is_yaml(value)):
            _check_file(Path(value), seen, config=option in CONFIG)
        elif value.startswith(("{", "[")):
            try:
                _check_text(value, option)
            except yaml.YAMLError:
                continue  # text that only looks so


def _is_yaml(value: str) -> bool:
    return len(value) < 4096 and Path(value).suffix in (".yaml", ".yml", ".json")


def _check_file(path: Path, seen: set[Path], *, config: bool = False) -> None:
    if not is_file(path) or path in seen:
        return  # jsonargparse says so, or it is a value after all
    seen.add(path)
    try:
        node = _check_text(path.read_text(encoding="utf-8"), str(path))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if config:
        _check_sections(node, str(path))
    for value in _texts(node):
        if _is_yaml(value):
            _check_file(path.parent / value, seen)


def _check_text(text: str, name: str) -> yaml.Node | None:
    try:
        node = yaml.compose(text, Loader=_LOADER)
        for mapping in _mappings(node, set()):
            lines: dict[str, int] = {}
            for key, _ in mapping.value:
                if not isinstance(key, yaml.ScalarNode):
                    continue
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise UserError(
                        f"{name}, line {line}: the key {key.value!r} is there twice, at line {lines[key.value]} too; leave one of them"
                    )
                lines[key.value] = line
    except RecursionError:
        raise UserError(f"{name} is nested too deeply") from None
    return node


def _mappings(node: yaml.Node | None, seen: set[int]) -> Iterator[yaml.MappingNode]:
    """Gives all mappings below a node, once each: an alias is the node that it stands for."""
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        yield node
        for _, value in node.value:
            yield from _mappings(value, seen)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _mappings(value, seen)


def _texts(node: yaml.Node | None) -> Iterator[str]:
    """Gives the texts that stand where options may be in a file of their own."""
    for mapping in _mappings(node, set()):
        for key, value in mapping.value:
            if isinstance(value, yaml.ScalarNode) and isinstance(key, yaml.ScalarNode) and key.value in _FILES:
                yield value.value


def _check_sections(node: yaml.Node | None, name: str, above: str = "") -> None:
    """Refuses an empty file, and a section that is neither options nor the path of a file or class that has them."""
    if not isinstance(node, yaml.MappingNode) or not (node.value or above):
        what = "is empty" if node is None or not node.value else "has no options"
        raise UserError(f"{name} {what}; expected lines such as 'model:' with '  net: cnn4' below, indented")
    for key, value in node.value:
        path = f"{above}{key.value}" if isinstance(key, yaml.ScalarNode) else ""
        if not above and path in COMMANDS and isinstance(value, yaml.MappingNode):
            _check_sections(value, name)
        if path == "config" and not value.tag.endswith(":null"):
            raise UserError(
                f"{name}, line {key.start_mark.line + 1}: a configuration names no other one; give each a -c of its own"
            )
        if path not in SECTIONS:
            continue
        if isinstance(value, yaml.MappingNode):
            _check_sections(value, name, f"{path}.")
        elif not isinstance(value, yaml.ScalarNode) or not value.tag.endswith(":str"):
            what = "empty" if value.tag.endswith(":null") else "no mapping"
            raise UserError(
                f"{name}, line {key.start_mark.line + 1}: {path!r} is {what}, which would take away what was given before; write its "
                f"options below '{key.value}:', indented, or leave the key out"
            )
