"""Every file that the documentation names exists, and so does every name in brackets behind one in the glossary."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "cgspn"
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")), *(ROOT / "docs").rglob("*.md")]
PAGES += [ROOT / "examples" / "README.md", ROOT / "benchmarks" / "README.md"]
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text()
NAMED = re.findall(r"`([a-z_0-9/]+\.py|[a-z_/]+/)`(?: \(((?:`[A-Za-z_.0-9]+`(?:, )?)+)\))?", GLOSSARY)
FILE = re.compile(r"`([a-z_0-9]+(?:/[a-z_0-9]+)*(?:\.py|/))`")


@pytest.mark.parametrize(("path", "names"), NAMED)
def test_the_glossary_names_what_exists(path, names):
    assert (SOURCE / path).exists()
    for name in re.findall(r"[A-Za-z_0-9.]+", names):
        text = (SOURCE / path).read_text()
        assert re.search(rf"\b{name.split('.')[-1]}\b", text), f"{name} is not in {path}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_that_pages_name_exist(page):
    known = {file.name for file in SOURCE.rglob("*.py")}
    for path in FILE.findall(page.read_text()):
        beside = [page.parent / path, ROOT / path, SOURCE.parent / path, SOURCE / path]
        outputs = path in ("runs/", "stages/", "snapshots/", "photos/")  # what commands write or read
        assert outputs or any(file.exists() for file in beside) or path in known, f"{page.name} names {path}"


def test_every_folder_of_the_readme_exists():
    folders = re.findall(r"^\| `([a-z/_.]+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert folders
    assert all((ROOT / folder).exists() for folder in folders)
