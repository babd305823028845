"""The `cgspn` program."""

from __future__ import annotations

import sys
from typing import Annotated

import tyro

from .commands.bench import Bench
from .commands.convert import Convert
from .commands.demo import Demo
from .commands.distill import Distill
from .commands.eval import Eval
from .commands.pretrain import Pretrain
from .console import console
from .distill import DivergedError

Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Distill, tyro.conf.subcommand("distill")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Pretrain, tyro.conf.subcommand("pretrain")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
)


def main() -> None:
    """Run one command. Exit code 0, or 2 with one line for wrong input, or 130 when interrupted."""
    command: Demo | Convert | Distill | Eval | Pretrain | Bench = tyro.cli(
        Command,  # type: ignore[arg-type]
        prog="cgspn",
        description=__doc__,
    )
    try:
        command.run()
    except (ValueError, OSError, DivergedError) as error:
        console.print(f"[bold red]cgspn: error:[/] {error}", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("cgspn: interrupted; files that were being written are left as they were before")
        sys.exit(130)


if __name__ == "__main__":
    main()
