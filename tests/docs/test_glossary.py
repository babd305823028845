"""Every file that the glossary or the README names exists, and so does every name in brackets behind one."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "cgspn"
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text()
NAMED = re.findall(r"`([a-z_/]+\.py)`(?: \(((?:`[A-Za-z_.0-9]+`(?:, )?)+)\))?", GLOSSARY)


@pytest.mark.parametrize(("path", "names"), NAMED)
def test_the_glossary_names_what_exists(path, names):
    text = (SOURCE / path).read_text()
    for name in re.findall(r"[A-Za-z_0-9.]+", names):
        assert re.search(rf"\b{name.split('.')[-1]}\b", text), f"{name} is not in {path}"


def test_every_folder_of_the_readme_exists():
    folders = re.findall(r"^\| `([a-z/_.]+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert folders
    assert all((ROOT / folder).exists() for folder in folders)
