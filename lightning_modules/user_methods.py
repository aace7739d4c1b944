"""The import of a user's own methods, which a configuration names with their module: `method: my_package.Kronecker`."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from tnlayers.errors import UserError
from tnlayers.method import Factorization, known_methods

__all__ = ["import_methods"]


def import_methods(rules: Sequence[Any]) -> None:
    """Imports the modules that a configuration's rules name; a configuration is trusted, and a checkpoint's rules never come here.

    Raises:
        UserError: there is no such module, or it has no such method.
    """
    entries = [rule for rule in rules if isinstance(rule, Mapping)]
    entries += [item for rule in entries if isinstance(rule.get("methods"), list) for item in rule["methods"]]
    named = {str(item.get("method", "") if isinstance(item, Mapping) else item) for item in entries}
    for name in sorted(name for name in named if "." in name):
        module, _, last = name.rpartition(".")
        if not all(part.isidentifier() for part in name.split(".")):
            raise UserError(f"method {name!r}: expected a module and a class, such as my_package.Kronecker")
        try:
            found = getattr(import_module(module), last, None)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # the module is there, and lacks another
            raise UserError(f"method {name!r}: {error}; install it, or put its folder on PYTHONPATH") from error
        if isinstance(found, type) and issubclass(found, Factorization) and found.name() != name:
            raise UserError(f"method {name!r} is called {found.name()!r} in rules: write that")
        if name not in (known := known_methods()):
            own = [known_name for known_name in known if known_name.startswith(f"{module}.")]
            raise UserError(
                f"method {name!r}: the module {module} defines {', '.join(own) or 'no method'}; a method is a subclass of "
                "tnlayers.Factorization"
            )
