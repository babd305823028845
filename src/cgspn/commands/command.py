"""The base class of commands, argument parsing, and help in two levels."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from copy import copy
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from functools import partial
from inspect import getdoc
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_type_hints

import docstring_parser
import tyro

# Positionals, shown in the help by their meaning, not their type.
Teacher = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TEACHER")]
Student = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STUDENT")]
Source = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
NEEDED = "(required)"  # tyro shows an empty default for several positionals
Models = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL", help_behavior_hint=NEEDED)]
Encoders = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="ENCODER", help_behavior_hint=NEEDED)]
Out = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
Device = Literal["auto", "cpu", "cuda"]
Kind = TypeVar("Kind")
Settings = tyro.conf.OmitArgPrefixes[Kind]  # settings without the name of the field that holds them


@dataclass(frozen=True)
class Command:
    """A command of the program.

    usual: paths of the settings that `--help` shows, such as "config.stage1.steps"; empty for all. Positionals are
    always shown.
    """

    usual: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def start(cls, arguments: list[str]) -> Command:
        """The default settings of the command, which may depend on `arguments`."""
        return cls(**{f.name: tyro.MISSING for f in fields(cls) if f.default is f.default_factory is MISSING})

    def run(self) -> None:
        """Run the command. Raises ValueError or OSError."""
        raise NotImplementedError


def parsed(kind: type[Command], program: str, arguments: list[str]) -> Command:
    """Parse arguments to a command. Raises SystemExit for help, and ValueError for invalid arguments."""
    start = kind.start(arguments)
    about: dict[str, Any] = {"prog": program, "description": getdoc(kind)}
    if kind.usual and {"-h", "--help"} & set(arguments):
        try:
            tyro.cli(usual_settings(kind, start), args=["--help"], **about)
        finally:
            print(f"These are the common options. {program} --help-all shows all of them.")
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return tyro.cli(kind, default=start, args=["--help"] if "--help-all" in arguments else arguments, **about)
    except SystemExit as end:
        if end.code in (0, None):
            raise
        raise ValueError(one_line(box.getvalue())) from None


def one_line(box: str) -> str:
    """tyro's framed message as one line: its first part and suggestions."""
    lines = [line.strip("│| ") for line in box.splitlines()[1:]]
    parts = [
        list(part) for rule, part in groupby(lines, lambda line: line.startswith(("──", "--" * 9, "╰"))) if not rule
    ]
    said = " ".join(parts[0]) if parts else ""
    near = [part[1].split()[0] for part in parts if part[0] == "Perhaps you meant:"]
    return f"{said}; did you mean {near[0]}?" if near else said


def usual_settings(kind: type[Command], start: Command) -> type:
    """A flat dataclass of a command's positionals and usual settings, with their descriptions and defaults."""
    positionals = [f.name for f in fields(kind) if getattr(start, f.name) is tyro.MISSING]
    shown = []
    for path in (*positionals, *kind.usual):
        owner: Any = kind
        value: Any = start
        for name in path.split("."):
            hint, words = get_type_hints(owner, include_extras=True)[name], descriptions(owner)[name]
            value = getattr(value, name)
            owner = type(value)
        more = (
            tyro.conf.arg(name=path.replace("_", "-"), help=words) if path in kind.usual else tyro.conf.arg(help=words)
        )
        default: Any = field() if value is tyro.MISSING else field(default_factory=partial(copy, value))
        shown.append((path.replace(".", "_"), Annotated[hint, more], default))
    return make_dataclass("Usual", shown, frozen=True)


def descriptions(kind: type) -> dict[str, str]:
    """The description of each field of a dataclass, from its docstring's Args or below the field."""
    found: dict[str, str] = {}
    for owner in reversed(kind.__mro__[:-1]):
        each = docstring_parser.parse_from_object(owner).params
        found |= {one.arg_name: " ".join((one.description or "").split()) for one in each}
    return found
