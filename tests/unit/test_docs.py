"""The pages: their links lead somewhere, their Python compiles, and what they list is what there is.

tests/conformance/test_pages.py runs the blocks.
"""

from __future__ import annotations

import re
from pathlib import Path

import pages
import pytest

from colltensor import environment

_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_FENCED = re.compile(r"^[ ]*```.*?^[ ]*```$", re.MULTILINE | re.DOTALL)


def _links(text: str) -> list[str]:
    """Return the links of a page to this repository."""
    found = _LINK.findall(_FENCED.sub("", text))
    return [link for link in found if not link.startswith(("http://", "https://"))]


def _anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", _FENCED.sub("", text), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


def _broken(page: Path, text: str) -> list[str]:
    """Return the links of a page that lead nowhere."""
    broken = []
    for link in _links(text):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve()
        if not target.exists() or (
            anchor and anchor not in _anchors(target.read_text() if name else text)
        ):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: str(page.relative_to(pages.ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert not _broken(page, page.read_text())


def test_a_broken_link_is_found() -> None:
    page = pages.ROOT / "README.md"
    text = "# Two words!\n[a](LICENSE) [b](missing.md) [c](#two-words) [d](#three) [e](https://example.org/x)\n"
    assert _broken(page, text) == ["missing.md", "#three"]


@pytest.mark.parametrize("block", pages.BLOCKS, ids=str)
def test_a_block_compiles(block: pages.Block) -> None:
    compile(block.code, str(block), "exec")


def test_a_block_is_found_with_its_mark() -> None:
    text = (
        "x\n<!-- test: 2 ranks, torch, a model -->\n```python\nx = 1\n```\n"
        "- y\n  ```python\n  y = 2\n  ```\n```\n2\n```\n"
    )
    first, second = pages.blocks_of("page.md", text)
    assert (first.ranks, first.needs, first.names) == (2, ("torch",), ("a model",))
    assert (first.line, first.code) == (4, "x = 1\n")
    assert (second.ranks, second.words, second.code, second.output) == (0, (), "y = 2\n", "2\n")


def test_the_page_of_variables_has_them_all() -> None:
    rows = re.findall(
        r"^\| `(COLLTENSOR_\w+)` \|",
        (pages.ROOT / "docs" / "environment.md").read_text(),
        re.MULTILINE,
    )
    assert sorted(rows) == sorted(environment.KNOWN)
