"""Code and commands on the documentation's pages work as they stand: pasted alone, into an empty folder."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from cgspn.cli import COMMANDS, command_of
from cgspn.commands.command import parsed

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "README.md"]
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)  # "{.python .norun}" needs what is not here
CONSOLE = re.compile(r"^```console\n(.*?)^```|^((?:    .*\n)+)", re.MULTILINE | re.DOTALL)

SLOW = "export_model", "transformers"  # what takes seconds, or is slow to import


def marks(code):
    found = [pytest.mark.slow] if any(word in code for word in SLOW) else []
    return [*found, pytest.mark.gpu] if ".cuda()" in code else found


SNIPPETS = [
    pytest.param(code, id=f"{page.stem}-{number}", marks=marks(code))
    for page in PAGES
    for number, code in enumerate(FENCE.findall(page.read_text()))
]


def commands():
    """(page, arguments) of every `cgspn` in a console block or an indented one."""
    for page in PAGES:
        for fenced, indented in CONSOLE.findall(page.read_text()):
            for line in (fenced or indented).replace("\\\n", " ").splitlines():
                found = re.match(r"\s*(?:torchrun .*-m cgspn\.cli|cgspn) (.*)", line.split(" # ")[0])
                if found:
                    yield pytest.param(shlex.split(found[1]), id=f"{page.stem}: {found[1][:60]}")


@pytest.mark.parametrize("code", SNIPPETS)
def test_snippet_runs_alone_and_prints(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("arguments", list(commands()))
def test_command_is_understood(arguments):
    words, rest = command_of(arguments)
    module, name = COMMANDS[words][0].split(":")
    assert parsed(getattr(import_module(f"cgspn.commands.{module}"), name), f"cgspn {words}", rest)
