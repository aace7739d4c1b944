"""One file per method: index strings, decomposition, source, and the drop-in layers. What lies in this folder is found."""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
