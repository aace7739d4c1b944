"""Which LightningModule a command is about: `ImageClassifier`, or one that a user names as `--model my_package.MyModule`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from lightning_modules.configurations import COMMANDS, CONFIG, options_of

__all__ = ["model_options", "names_model_class"]


def names_model_class(arguments: Sequence[str]) -> bool:
    """Returns whether the arguments of a command, or a configuration among them, name a class as the model.

    Without one, all options of the model are those of `ImageClassifier`, such as `--model.net resnet20`.
    """
    for option, value in options_of(arguments):
        if option == "--model.class_path" or (option == "--model" and _is_class(value, Path())):
            return True
        if option in CONFIG:
            content, folder = _read(value, Path()), Path(value).parent
            parts = [content, *(content.get(command) for command in COMMANDS)] if isinstance(content, Mapping) else []
            if any(_is_class(part["model"], folder) for part in parts if isinstance(part, Mapping) and "model" in part):
                return True
    return False


def model_options(config: Namespace) -> Namespace:
    """Returns the options of the model, however its class was chosen."""
    return (config.model.get("init_args") or Namespace()) if "class_path" in config.model else config.model


def _is_class(value: Any, folder: Path) -> bool:
    """Returns whether a value of `model` is a class, or options with one, and not options of `ImageClassifier` alone."""
    content = _read(value, folder) if isinstance(value, str) else value
    return "class_path" in content if isinstance(content, Mapping) else isinstance(content, str)


def _read(value: str, folder: Path) -> Any:
    """Returns what a YAML file holds, or the options that a text is; any other text stays as it is."""
    if value.startswith("{"):
        return yaml.safe_load(value)
    if not value.endswith((".yaml", ".yml", ".json")):
        return value
    path = folder / value
    return yaml.safe_load(path.read_text("utf-8")) if path.is_file() else {}  # jsonargparse says that it is missing
