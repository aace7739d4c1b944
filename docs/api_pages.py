"""A hook of MkDocs: one page for each public name, and their index."""

from importlib import import_module

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_ALL = ("tnlayers", "lightning_modules.callbacks", "lightning_modules.data")
NAMES = {
    **{package: sorted(import_module(package).__all__, key=str.lower) for package in _ALL},
    "lightning_modules.classifier": ["ImageClassifier"],
    "lightning_modules.tensorized": ["TensorizedCheckpoint"],
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Appends the pages to the navigation."""
    pages = [{package: [{name: f"api/{package}.{name}.md"} for name in names]} for package, names in NAMES.items()]
    assert config.nav is not None
    config.nav.append({"API": ["api/index.md", *pages]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Makes the pages: mkdocstrings fills in what stands in the docstrings."""
    index = ["# API"]
    for package, names in NAMES.items():
        index += ["", f"## {package}", ""]
        for name in names:
            summary = (getattr(import_module(package), name).__doc__ or "").partition("\n")[0]
            index.append(f"- [`{name}`]({package}.{name}.md): {summary}")
            files.append(File.generated(config, f"api/{package}.{name}.md", content=f"::: {package}.{name}\n"))
    files.append(File.generated(config, "api/index.md", content="\n".join(index) + "\n"))
    return files
