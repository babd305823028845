"""timm and OpenCLIP where torchvision cannot be imported: both load it for names that building a model never calls.

Only the parts that tests use are safe: models, not transforms. `import_library` leaves a real torchvision alone.
"""

from __future__ import annotations

import enum
import importlib
import importlib.abc
import importlib.machinery
import sys
import types

FILTERS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


class _Module(types.ModuleType):
    """Any attribute is an empty class."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (), {})
        if name == "InterpolationMode":
            value = enum.Enum(name, {n.upper(): n for n in FILTERS})
        elif name in ("transforms", "functional", "datasets", "models", "ops", "utils"):
            value = importlib.import_module(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        found = name == "torchvision" or name.startswith("torchvision.")
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if found else None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        module.__version__ = "0.0"


def import_library(name):
    """The library of this name, around stand-ins for torchvision if it has none. Raises ImportError without it."""
    import transformers  # noqa: F401  (it asks for the version of a torchvision that it can find)

    finder = _Finder()
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):  # RuntimeError: it was built for another torch
        for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[module]
        sys.meta_path.insert(0, finder)
    try:
        return importlib.import_module(name)
    finally:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
