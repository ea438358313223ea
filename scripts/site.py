"""Hooks of mkdocs: add documents of the repository root as pages, and convert formulas to MathML.

Browsers render MathML without JavaScript.
"""

import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
FORMULA = re.compile(r"\$\$(.+?)\$\$", re.DOTALL)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)((?:#[^)]+)?)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents of the repository root as pages, with links relative to docs/."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=LINK.sub(moved, (ROOT / name).read_text())))
    return files


def moved(link: re.Match[str]) -> str:
    """Rewrite a link in a document of the root; a link to a file outside the site becomes plain text."""
    image, text, target, anchor = link.groups()
    if target.startswith(("http://", "https://")):
        return link[0]
    if target in PAGES or target.startswith("docs/"):
        return f"{image}[{text}]({PAGES.get(target) or target.removeprefix('docs/')}{anchor})"
    return text


def on_page_markdown(markdown: str, **_: object) -> str:
    """Convert formulas to MathML, and links that leave docs/ to plain text."""
    markdown = LINK.sub(lambda link: link[2] if link[3].startswith("../") else link[0], markdown)
    return FORMULA.sub(lambda formula: convert(formula[1].strip(), display="block"), markdown)
