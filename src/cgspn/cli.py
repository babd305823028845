"""Attention encoders to C-GSPN students: convert, distill, evaluate, show, export, measure.

Every command takes --debug, which prints the traceback of an error.
"""

from __future__ import annotations

import errno
import io
import os
import re
import sys
import traceback
from contextlib import redirect_stderr
from inspect import getdoc
from traceback import walk_tb
from typing import Annotated, Any, Union

import torch
import tyro
from rich.text import Text

from .commands.bench import Bench
from .commands.convert import Convert
from .commands.demo import Demo
from .commands.distill import Distill
from .commands.eval import Eval
from .commands.export import Export
from .commands.pretrain import Pretrain
from .commands.show import Show
from .console import console
from .distill import DivergedError, ParityError, SnapshotError
from .distill.presets import PRESETS

DEBUG = "--debug"
EXPECTED = (ValueError, OSError, ImportError, DivergedError, ParityError, SnapshotError)  # said for people

Command = Demo | Convert | Distill | Eval | Show | Pretrain | Bench | Export


def command_type(arguments: list[str]) -> Any:
    """What can be run; `--preset NAME` decides what the other settings of distill start from."""
    preset = "embedded"
    for option, value in zip(arguments, [*arguments[1:], ""]):
        if option == "--preset" or option.startswith("--preset="):
            preset = option.partition("=")[2] or value
    distill = Distill(tyro.MISSING, tyro.MISSING, config=PRESETS.get(preset, PRESETS["embedded"]))
    kinds: dict[type, Any] = {Demo: None, Convert: None, Distill: distill, Eval: None, Show: None}
    kinds |= {Pretrain: None, Bench: None, Export: None}
    # tyro leaves the examples out of a docstring that it reads by itself
    named = [
        Annotated[kind, tyro.conf.subcommand(kind.__name__.lower(), description=getdoc(kind), **default(start))]
        for kind, start in kinds.items()
    ]
    return Union[tuple(named)]  # noqa: UP007 - made at run time


def default(start: Any) -> dict[str, Any]:
    """The option of a sub-command that starts from an object."""
    return {} if start is None else {"default": start}


def main() -> None:
    """Run one command. Exit code 0, or 2 with one line for any error, or 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):  # names may hold what the terminal's encoding has no character for
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        run([argument for argument in sys.argv[1:] if argument != DEBUG], debug=DEBUG in sys.argv)
    except BrokenPipeError:  # what reads our output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def run(arguments: list[str], debug: bool = False) -> None:
    """`main`, but for a broken pipe; debug: print the traceback of an error before its one line."""
    try:
        parsed(arguments).run()
    except BrokenPipeError:
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
        console.print(Text.assemble(("cgspn: error: ", "bold red"), said_of(error)), soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("cgspn: interrupted; files that were being written are left as they were before")
        sys.exit(130)


def said_of(error: Exception) -> str:
    """An error in one line: as it was said for people, or what broke and where."""
    text = " ".join(str(error).split()) or type(error).__name__
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    names = [f"{f.f_globals.get('__name__')}.{f.f_code.co_name}" for f in frames]
    place = next((name for name in reversed(names) if name.startswith("cgspn.")), "cgspn")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in text:
        amount = re.search(r"allocate ([\d.]+ ?\w+)", text)
        return f"out of memory: {place} asked for {amount[1] if amount else 'more than there is'}"
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return f"disk full: {text}"
    if isinstance(error, EXPECTED):
        return text
    return f"unexpected {type(error).__name__} in {place}: {text} (with {DEBUG}, the traceback is printed)"


def parsed(arguments: list[str]) -> Command:
    """The command of a command line. Raises ValueError for settings that refuse themselves, SystemExit for others."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            command: Command = tyro.cli(command_type(arguments), args=arguments, prog="cgspn", description=__doc__)
            return command
    except SystemExit as end:
        error = refusal(end)
        if error is None:
            raise
        said.truncate(0)  # tyro names an argument by its place in our classes, which nobody types
        raise ValueError(as_typed(str(error), arguments)) from error
    finally:
        sys.stderr.write(said.getvalue())


def refusal(end: BaseException) -> ValueError | None:
    """The ValueError of this package, such as that of a config's `__post_init__`, for which tyro ended the program."""
    cause: BaseException | None = end
    while cause is not None:
        frames = [frame for frame, _ in walk_tb(cause.__traceback__)]
        if isinstance(cause, ValueError) and frames and frames[-1].f_globals["__name__"].startswith("cgspn."):
            return cause
        cause = cause.__context__
    return None


def as_typed(message: str, arguments: list[str]) -> str:
    """A message that begins with names of settings, which become the options that were typed for them.

    Of several options that end alike, the one whose value the message states.
    """
    options = [
        (argument.partition("=")[0], argument.partition("=")[2] or following)
        for argument, following in zip(arguments, [*arguments[1:], ""])
        if argument.startswith("--")
    ]

    def typed(name: re.Match[str]) -> str:
        same = [each for each in options if re.split(r"--|\.", each[0])[-1].replace("-", "_") == name[0]]
        stated = [option for option, value in same if message.startswith(f"{name[0]} is {value};")]
        return (stated or [option for option, _ in same] or [name[0]])[0]

    names = re.match(r"\w+(, \w+)*( and \w+)?(?= (is|are|holds)\b|: )", message)
    return re.sub(r"\w+", typed, names[0]) + message[names.end() :] if names else message


if __name__ == "__main__":
    main()
