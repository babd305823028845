"""The `cgspn` program."""

from __future__ import annotations

import os
import sys
from inspect import getdoc
from typing import Annotated, Any, Union

import tyro

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
    """Run one command. Exit code 0, or 2 with one line for wrong input, or 130 when interrupted."""
    try:
        run()
    except BrokenPipeError:  # what reads our output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def run() -> None:
    """`main`, but for a broken pipe."""
    command: Demo | Convert | Distill | Eval | Show | Pretrain | Bench | Export = tyro.cli(
        command_type(sys.argv[1:]),
        prog="cgspn",
        description=__doc__,
    )
    try:
        command.run()
    except BrokenPipeError:
        raise
    except (ValueError, OSError, DivergedError, ParityError, SnapshotError) as error:
        console.print(f"[bold red]cgspn: error:[/] {error}", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("cgspn: interrupted; files that were being written are left as they were before")
        sys.exit(130)


if __name__ == "__main__":
    main()
