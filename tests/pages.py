"""The Python blocks of the pages, and how each is to be run.

A comment before a block says how: ``<!-- test: 2 ranks, torch, ... -->``. Without one a block is a program of its own,
which is run as pasted. The words of the comment:
    N ranks         executed in N ranks of one default group, but where the block makes a group itself
    numpy, torch, jax   needs this framework
    torchrun        with torchrun's variables set
    another word    a set of names that the block counts on, or what is checked afterwards: see test_pages.py
    compile         is only compiled; the words after it say why
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("benchmarks/results/*.md")),
]
FRAMEWORKS = ("numpy", "torch", "jax")

_BLOCK = re.compile(
    r"^(?P<mark>[ ]*<!-- test: (?P<words>[^>]*?) -->\n)?(?P<indent>[ ]*)```python\n(?P<code>.*?)^[ ]*```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A block of Python: where it stands, what it says, the words of its mark, and what a page shows as its output."""

    page: str
    line: int
    code: str
    words: tuple[str, ...]
    output: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def ranks(self) -> int:
        """In how many ranks it runs; 0 for a program of its own or what is only compiled."""
        return next(
            (int(word.split()[0]) for word in self.words if re.fullmatch(r"\d ranks", word)), 0
        )

    @property
    def needs(self) -> tuple[str, ...]:
        """The frameworks that it needs."""
        return tuple(word for word in self.words if word in FRAMEWORKS)

    @property
    def names(self) -> tuple[str, ...]:
        """The other words of its mark."""
        return tuple(
            word for word in self.words if word not in FRAMEWORKS and not word.endswith(" ranks")
        )


def blocks_of(page: str, text: str) -> list[Block]:
    """Return the blocks of one page."""
    found = []
    for match in _BLOCK.finditer(text):
        words = tuple(word.strip() for word in (match["words"] or "").split(",") if word.strip())
        line = text.count("\n", 0, match.start("code")) + 1
        after = re.search(r"^```\n(.*?)^```$", text[match.end() :], re.MULTILINE | re.DOTALL)
        found.append(
            Block(page, line, textwrap.dedent(match["code"]), words, after[1] if after else "")
        )
    return found


BLOCKS = [
    block for page in PAGES for block in blocks_of(str(page.relative_to(ROOT)), page.read_text())
]
