"""The environment of a result: command, machine, versions, commit."""

import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import torch

from . import __version__


def commit() -> str:
    """The commit of this checkout, with "+" if it has changes; "unknown" for an installed package."""

    def git(*arguments: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # fails for an installed package
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def command(program: str = "cgspn") -> str:
    """The command line of this process; program: what its arguments were given to."""
    return " ".join([program, *map(shlex.quote, sys.argv[1:])])


def versions() -> dict[str, str]:
    """Versions of this package, PyTorch and Python."""
    return {"cgspn": __version__, "torch": torch.__version__, "python": platform.python_version()}


def describe(commit_name: str = "", program: str = "cgspn") -> dict[str, str]:
    """Command, machine, versions, commit and time of a result.

    commit_name: replaces `commit()`. program: the name of the command in front of this process's arguments.
    """
    return {
        "command": command(program),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "cpu": cpu_name(),
        **versions(),
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "commit": commit_name or commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def cpu_name() -> str:
    """The CPU's name and the number of threads that PyTorch uses."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads"
