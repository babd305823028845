"""The entry point of `cgspn`: find the command, run it, and report errors in one line."""

import io
import os
import sys
import traceback
from difflib import get_close_matches
from importlib import import_module

from . import __version__

# name: (module and class, description). A module is imported only when its command is used.
COMMANDS = {
    "demo": ("demo:Demo", "run the whole pipeline on included images, in minutes on a laptop"),
    "convert": ("convert:Convert", "convert a pretrained attention encoder into a C-GSPN student"),
    "distill": ("distill:Distill", "convert a teacher and distill the student"),
    "eval all": ("eval:All", "all evaluations of an image-text model that the datasets support"),
    "eval zeroshot": ("eval:Zeroshot", "zero-shot classification"),
    "eval retrieval": ("eval:Retrieval", "image-text retrieval"),
    "eval segment": ("eval:Segment", "semantic segmentation with a linear probe"),
    "show": ("show:Show", "visualise the features of an encoder on photographs"),
    "export": ("export:Export", "export an encoder to ONNX, torch.export or AOTInductor"),
    "pretrain": ("pretrain:Pretrain", "train a small image-text model from scratch"),
    "bench operator": ("bench:Operator", "the operator, compared with memory bandwidth, PyTorch and attention"),
    "bench table": ("bench:Table", "blocks with attention, GSPN and C-GSPN, from 378 to 4116 px"),
    "bench encoder": ("bench:Encoders", "whole encoders: images/s, memory, latency of one image"),
    "bench train": ("bench:Train", "distillation steps: images/s, MFU, memory, largest batch"),
    "bench scaling": ("bench:Scaling", "distillation on several GPUs"),
}
HELP = ("-h", "--help", "--help-all")


def main() -> None:
    """Run one command. Returns exit code 0, or 2 after an error (printed in one line), or 130 after an interrupt."""
    for stream in (sys.stdout, sys.stderr):  # file names may contain characters that the terminal cannot encode
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    try:
        run(arguments)
    except BrokenPipeError:  # a reader such as `head` has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(_said("interrupted; unfinished output files were discarded", 130))
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
    """Parse a command line and run its command. Raises ValueError for an unknown command, and its errors."""
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
    """Split the words into a command (or group) and its arguments. Raises ValueError for an unknown command."""
    words: list[str] = []
    for argument in arguments:
        if argument in HELP:
            break
        names = sorted({each[len(words)] for each in map(str.split, COMMANDS) if each[: len(words)] == words})
        if argument not in names:
            near = get_close_matches(argument, names, 2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"accepted: {', '.join(names)}"
            raise ValueError(f"{argument!r} is not a command of {' '.join(['cgspn', *words])}; {hint}")
        words.append(argument)
        if " ".join(words) in COMMANDS:
            break
    return " ".join(words), arguments[len(words) :]


def overview(group: str) -> str:
    """The help text of the program or of a group of commands."""
    shown = {words: about for words, (_, about) in COMMANDS.items() if not group or words.startswith(f"{group} ")}
    width = max(map(len, shown))
    lines = [f"  {words:<{width}}  {about}" for words, about in shown.items()]
    return f"""usage: cgspn {group or "[--version] [--debug]"} COMMAND [OPTIONS]

Convert attention encoders into C-GSPN encoders; distill, evaluate, visualise, export and measure them.

{chr(10).join(lines)}

`cgspn COMMAND --help` shows examples and common options, `--help-all` all options.
`--debug` prints the traceback of an error."""


if __name__ == "__main__":
    main()
