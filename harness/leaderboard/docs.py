"""The documentation as pages of the site: Markdown to HTML, with the figures beside it."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt

# In a checkout; an installed package has none, and its site goes without.
DOCS = Path(__file__).parents[2] / "docs"
# What comes first in the list of pages, and what the navigation calls it.
FIRST = {
    "tutorial": "Tutorial", "paper": "The paper's claims", "accuracy": "Accuracy of the estimates",
    "scale": "Speed and scale", "protocol": "Protocol", "verdict": "Rules of the verdict",
    "add-a-model": "Add a model", "dataset": "The dataset",
}  # fmt: skip
_STATUS = re.compile(r"<strong>(reproduced|partly|not [a-z ]+|undecided)</strong>")
_SUFFIXES = {".svg", ".png", ".json"}


@dataclass(frozen=True)
class Page:
    """A page of the documentation.

    Attributes:
        name: Of its file, without the suffix.
        title: Its first heading.
        body: HTML.
        sections: Anchor and text of its headings of the second level.
    """

    name: str
    title: str
    body: str
    sections: tuple[tuple[str, str], ...]

    @property
    def label(self) -> str:
        """What the navigation calls it."""
        return FIRST.get(self.name, self.title)


def pages(folder: Path) -> list[Page]:
    """Return a page per Markdown file of a folder, the first to read first."""
    names = sorted(path.stem for path in folder.glob("*.md"))
    order = [*(name for name in FIRST if name in names), *(n for n in names if n not in FIRST)]
    return [_page(folder, name, set(names)) for name in order]


def copy_figures(folder: Path, out: Path) -> None:
    """Copy the figures and numbers that the pages show into a folder of the site."""
    for path in sorted(folder.glob("*/*")):
        if path.suffix in _SUFFIXES:
            target = out / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def _page(folder: Path, name: str, names: set[str]) -> Page:
    text = (folder / f"{name}.md").read_text(encoding="utf-8")
    markdown = MarkdownIt("commonmark").enable("table")
    tokens = markdown.parse(text)
    title, sections, used = name, [], set[str]()
    for token, inline in pairwise(tokens):
        if token.type != "heading_open":
            continue
        words = re.sub(r"[`*]", "", inline.content)
        anchor = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")  # as GitHub does
        while anchor in used:
            anchor += "-1"
        used.add(anchor)
        token.attrSet("id", anchor)
        if token.tag == "h1":
            title = words
        elif token.tag == "h2":
            sections.append((anchor, words))
    for token in (child for inline in tokens for child in inline.children or ()):
        if token.type == "link_open":
            token.attrSet("href", _link(str(token.attrGet("href")), folder, names))
    body = str(markdown.renderer.render(tokens, markdown.options, {}))
    return Page(name, title, _finished(body), tuple(sections))


def _link(target: str, folder: Path, names: set[str]) -> str:
    """Return a link to a page, to a file that is copied or abroad; the page itself for others."""
    path, mark, fragment = target.partition("#")
    if re.match(r"https?:", target) or not path:
        return target
    if path.removesuffix(".md") in names:
        return f"{path.removesuffix('.md')}.html{mark}{fragment}"
    copied = Path(path).suffix in _SUFFIXES and (folder / path).is_file()
    return path if copied else "#main"


def _finished(body: str) -> str:
    """Let wide tables scroll, give columns' heads their scope, and colour what a claim came to."""
    region = '<div class="scroll" tabindex="0" role="region" aria-label="Table"><table>'
    body = body.replace("<table>", region).replace("</table>", "</table></div>")
    body = re.sub(r"<th\b", '<th scope="col"', body)
    body = body.replace("<img ", '<img loading="lazy" ')
    return _STATUS.sub(
        lambda m: f'<strong class="status {m[1].replace(" ", "-")}">{m[1]}</strong>', body
    )
