"""The marks of the project agree with each other: versions, citation, CI, templates."""

import re
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

import cgspn

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MADE = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def read(path):
    return yaml.safe_load((ROOT / path).read_text())


def test_the_package_is_typed():
    assert files("cgspn").joinpath("py.typed").is_file()


def test_ci_runs_every_python_and_the_bounds_of_torch():
    matrix = read(".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]
    named = {c.rsplit(" ", 1)[1] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)}
    (oldest,) = (d.removeprefix("torch>=") for d in PROJECT["dependencies"] if d.startswith("torch>="))
    assert set(matrix["python"]) == named
    assert matrix["torch"] == [f"torch=={oldest}.*", "torch"]


@pytest.mark.parametrize("workflow", ["ci.yml", "gpu.yml"])
def test_ci_makes_what_the_makefile_has(workflow):
    steps = [step for job in read(f".github/workflows/{workflow}")["jobs"].values() for step in job["steps"]]
    wanted = [word for step in steps if "run" in step for word in re.findall(r"^make ([a-z -]+)", step["run"])]
    assert wanted
    assert {target for words in wanted for target in words.split()} <= MADE


def test_citation_has_the_version_and_what_the_format_requires():
    citation = read("CITATION.cff")
    assert citation["version"] == cgspn.__version__
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert {"type", "title", "authors", "year"} <= citation["preferred-citation"].keys()


@pytest.mark.parametrize("form", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem)
def test_issue_forms_have_what_github_requires(form):
    content = yaml.safe_load(form.read_text())
    if form.stem != "config":
        assert {"name", "description", "body"} <= content.keys()
        assert all("label" in part["attributes"] for part in content["body"])


def test_changelog_starts_with_what_is_unreleased():
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "[Unreleased]"
