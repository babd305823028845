"""What a result says of where it came from."""

import shlex
import sys

from cgspn.environment import command


def test_the_command_can_be_pasted(monkeypatch):
    """Arguments are quoted where a shell needs it; a program of several words stays a program."""
    monkeypatch.setattr(sys, "argv", ["script.py", "--rows", "values 6", "--px", "224"])
    assert command("python -m benchmarks.frontier") == "python -m benchmarks.frontier --rows 'values 6' --px 224"
    assert shlex.split(command()) == ["cgspn", "--rows", "values 6", "--px", "224"]
