"""The program `cgspn`: which command was asked for, and what is said when it cannot be done."""

import io
import os
import sys
import traceback
from difflib import get_close_matches
from importlib import import_module

from . import __version__

# words: where the command is, and what it is for. A module is imported when its command is asked for.
COMMANDS = {
    "demo": ("demo:Demo", "distill and evaluate on images that come with the package, in minutes on a laptop"),
    "convert": ("convert:Convert", "replace the attention of a pretrained encoder by propagation"),
    "distill": ("distill:Distill", "train a converted student on its teacher's features"),
    "eval all": ("eval:All", "everything that the data sets allow an image-text model"),
    "eval zeroshot": ("eval:Zeroshot", "zero-shot classification"),
    "eval retrieval": ("eval:Retrieval", "image-text retrieval"),
    "eval segment": ("eval:Segment", "semantic segmentation by a linear probe"),
    "show": ("show:Show", "write a page that shows photographs as an encoder sees them"),
    "export": ("export:Export", "write an encoder as ONNX, torch.export or AOTInductor"),
    "pretrain": ("pretrain:Pretrain", "train a small image-text model from scratch"),
    "bench operator": ("bench:Operator", "the operator against memory bandwidth, PyTorch and attention"),
    "bench table": ("bench:Table", "blocks with attention, GSPN and C-GSPN, from 378 to 4116 px"),
    "bench encoder": ("bench:Encoders", "whole encoders: images/s, memory, one image at a time"),
    "bench train": ("bench:Train", "steps of distillation: images/s, MFU, memory, the largest batch"),
    "bench scaling": ("bench:Scaling", "distillation on several GPUs"),
}
HELP = ("-h", "--help", "--help-all")


def main() -> None:
    """Run one command. Exit code 0, or 2 with one line for any error, or 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):  # names may hold what the terminal's encoding has no character for
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    try:
        run(arguments)
    except BrokenPipeError:  # what reads our output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(_said("interrupted; files that were being written are left as they were before", 130))
    except Exception as error:
        if debug:
            traceback.print_exc()
        from .commands.errors import said_of

        sys.exit(_said(f"error: {said_of(error)}", 2))


def _said(words: str, code: int) -> int:
    from .terminal import plain

    print(f"cgspn: {plain(words)}", file=sys.stderr)
    return code


def run(arguments: list[str]) -> None:
    """Run the command of a command line. Raises ValueError for one that does not exist, and what the command raises."""
    if arguments[:1] == ["--version"]:
        print(f"cgspn {__version__}")
        return
    words, rest = command_of(arguments)
    if words not in COMMANDS:
        print(overview(words))
        return
    module, _, name = COMMANDS[words][0].partition(":")
    kind = getattr(import_module(f".commands.{module}", __package__), name)
    from .commands.command import parsed

    parsed(kind, f"cgspn {words}", rest).run()


def command_of(arguments: list[str]) -> tuple[str, list[str]]:
    """The words of a command or a group of them, and the arguments after them. Raises ValueError for others."""
    words: list[str] = []
    for argument in arguments:
        if argument in HELP:
            break
        names = sorted({each[len(words)] for each in map(str.split, COMMANDS) if each[: len(words)] == words})
        if argument not in names:
            near = get_close_matches(argument, names, 2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"accepted: {', '.join(names)}"
            raise ValueError(f"{argument!r} is no command of {' '.join(['cgspn', *words])}; {hint}")
        words.append(argument)
        if " ".join(words) in COMMANDS:
            break
    return " ".join(words), arguments[len(words) :]


def overview(group: str) -> str:
    """The help of the program, or of a group of its commands."""
    shown = {words: about for words, (_, about) in COMMANDS.items() if not group or words.startswith(f"{group} ")}
    width = max(map(len, shown))
    lines = [f"  {words:<{width}}  {about}" for words, about in shown.items()]
    return f"""usage: cgspn {group or "[--version] [--debug]"} COMMAND [OPTIONS]

Attention encoders to C-GSPN students: convert, distill, evaluate, show, export, measure.

{chr(10).join(lines)}

`cgspn COMMAND --help` shows examples and the usual options, `--help-all` every option.
`--debug` shows where an error comes from."""


if __name__ == "__main__":
    main()
