"""A hook of mkdocs: API pages made from `__all__`, one for each module with its functions and one for each class."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

MODULES = ("ops", "layers", "models", "teachers", "data", "distill", "evaluate", "export")


def public(module: str) -> tuple[list[str], list[str]]:
    """The classes and the other names of a module's `__all__`, each in order."""
    found = importlib.import_module(f"cgspn.{module}")
    classes = [name for name in found.__all__ if inspect.isclass(getattr(found, name))]
    return classes, [name for name in found.__all__ if name not in classes]


def first_line(module: str, name: str) -> str:
    """What a class is, in its docstring's first sentence."""
    text = inspect.getdoc(getattr(importlib.import_module(f"cgspn.{module}"), name)) or ""
    return " ".join(text.split("\n\n")[0].split())


def module_page(module: str, intro: str) -> str:
    """The committed introduction, the table of classes, then the functions."""
    classes, others = public(module)
    rows = [
        f"| [`{name}`]({module}/{name}.md) | {first_line(module, name).replace('|', chr(92) + '|')} |"
        for name in classes
    ]
    table = ["## Classes", "", "| class | |", "|---|---|", *rows, ""] if rows else []
    functions = "".join(f"\n::: cgspn.{module}.{name}\n    options: {{heading_level: 3}}\n" for name in others)
    return "\n".join([intro.rstrip(), "", *table, "## Functions and constants", functions])


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages into the navigation, in place of the entry `api/index.md`."""
    entries: list[object] = ["api/index.md"]
    for module in MODULES:
        classes, _ = public(module)
        entries.append({f"cgspn.{module}": [f"api/{module}.md", *(f"api/{module}/{name}.md" for name in classes)]})
    for section in config.nav or []:
        if isinstance(section, dict) and "API" in section:
            section["API"] = entries
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each class, and complete those of the modules."""
    for module in MODULES:
        uri = f"api/{module}.md"
        written = files.get_file_from_path(uri)
        assert written is not None, f"docs/{uri} is missing"
        intro = Path(config.docs_dir, uri).read_text()
        files.remove(written)
        files.append(File.generated(config, uri, content=module_page(module, intro)))
        for name in public(module)[0]:
            content = f"---\ntitle: {name}\n---\n\n::: cgspn.{module}.{name}\n    options: {{heading_level: 1}}\n"
            files.append(File.generated(config, f"api/{module}/{name}.md", content=content))
    return files
