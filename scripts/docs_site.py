"""A hook of mkdocs: the site also holds results/ and examples/, so that pages show measurements where they lie.

Pages link to them as they do on GitHub, `../results/...`; the site's root is docs/, so that the step up is taken away.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
SHOWN = {".md", ".png", ".json"}
OUTSIDE = re.compile(r"(\]\()(?:\.\./)+((?:results|examples|benchmarks|src|scripts|tests)/[^)]*)")
INSIDE = re.compile(r"(\]\()(?:\.\./)*docs/")
SOURCES = re.compile(r"\[([^\]]+)\]\((?:(?:benchmarks|src|scripts|tests)/[^)]*|[^)]*\.py)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies beside docs/."""
    for folder in ("results", "examples"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SHOWN:
                uri = path.relative_to(ROOT).as_posix()
                files.append(File.generated(config, uri, abs_src_path=str(path)))
    files.append(File.generated(config, "SECURITY.md", abs_src_path=str(ROOT / "SECURITY.md")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links into the repository as links within the site; those to sources, which it does not hold, as text."""
    if page.file.src_uri == "changelog.md":
        markdown = (ROOT / "CHANGELOG.md").read_text()
    depth = page.file.src_uri.count("/")
    if page.file.src_uri.startswith(("results/", "examples/")):
        markdown = INSIDE.sub(rf"\1{'../' * depth}", markdown)
        outside = re.compile(r"\[([^\]]+)\]\((?:\.\./)+(?:benchmarks|src|scripts|tests|README)[^)]*\)")
        return SOURCES.sub(r"\1", outside.sub(r"\1", markdown))
    return SOURCES.sub(r"\1", INSIDE.sub(r"\1", OUTSIDE.sub(r"\1\2", markdown)))
