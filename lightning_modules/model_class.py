"""Which LightningModule a command is about: `ImageClassifier`, or one that a user names as `--model my_package.MyModule`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from lightning_modules.configurations import COMMANDS, CONFIG, is_yaml, options_of

__all__ = ["model_options", "names_model_class"]


def names_model_class(arguments: Sequence[str], contents: Mapping[str, Any]) -> bool:
    """Returns whether the arguments of a command, or a configuration among them, name a class as the model.

    Without one, all options of the model are those of `ImageClassifier`, such as `--model.net resnet20`.

    Args:
        arguments: of the command.
        contents: of the YAML among them, as `read_yaml` returns it.
    """
    for option, value in options_of(arguments):
        if option == "--model.class_path" or (option == "--model" and _is_class(value, Path(), contents)):
            return True
        if option in CONFIG:
            inline = value.startswith("{")
            content, folder = contents.get(value if inline else str(Path(value))), Path(value).parent
            parts = [content, *(content.get(command) for command in COMMANDS)] if isinstance(content, Mapping) else []
            models = [part["model"] for part in parts if isinstance(part, Mapping) and "model" in part]
            if any(_is_class(model, folder, contents) for model in models):
                return True
    return False


def model_options(config: Namespace) -> Namespace:
    """Returns the options of the model, however its class was chosen."""
    return (config.model.get("init_args") or Namespace()) if "class_path" in config.model else config.model


def _is_class(value: Any, folder: Path, contents: Mapping[str, Any]) -> bool:
    """Returns whether a value of `model` is a class, or options with one, and not options of `ImageClassifier` alone."""
    if isinstance(value, str) and value.startswith("{"):
        value = contents.get(value, {})
    elif isinstance(value, str) and is_yaml(value):
        value = contents.get(str(folder / value), {})
    return "class_path" in value if isinstance(value, Mapping) else isinstance(value, str)
