"""Hooks of mkdocs: the root's documents become pages, and formulas MathML, which browsers draw without a script."""

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
    """Add the pages of the root, their links as seen from docs/."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=LINK.sub(moved, (ROOT / name).read_text())))
    return files


def moved(link: re.Match[str]) -> str:
    """A link of a file of the root; what is no page of the site stays as text."""
    image, text, target, anchor = link.groups()
    if target.startswith(("http://", "https://")):
        return link[0]
    if target in PAGES or target.startswith("docs/"):
        return f"{image}[{text}]({PAGES.get(target) or target.removeprefix('docs/')}{anchor})"
    return text


def on_page_markdown(markdown: str, **_: object) -> str:
    """Formulas as MathML; links that leave docs/ as text."""
    markdown = LINK.sub(lambda link: link[2] if link[3].startswith("../") else link[0], markdown)
    return FORMULA.sub(lambda found: convert(found[1].strip(), display="block"), markdown)
