"""Print how long each page's sentences are, and fail where they are too long.

    python tools/sentences.py                 README, ARCHITECTURE, CONTRIBUTING and docs/
    python tools/sentences.py PAGE.md ...     these pages

A sentence ends with a full stop, a question or exclamation mark, or with its paragraph, list item
or heading. Code blocks, tables and links' addresses count for nothing; code in a line counts as it
reads. The 90th percentile decides, and in README.md the longest sentence as well. Needs nothing but
Python.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README_WORDS = 25
PAGE_WORDS = 28

_FENCE = re.compile(r"^\s*(```|~~~)")
_ITEM = re.compile(r"^\s*(?:[-*+]|\d+\.)\s+")
_CODE = re.compile(r"`+([^`]*)`+")
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)[)*_\"']*\s+")
_WORD = re.compile(r"\w")


def paragraphs(text: str) -> list[str]:
    """Return a page's paragraphs, list items and headings, each in one line."""
    found: list[list[str]] = [[]]
    in_code = False
    for line in _COMMENT.sub("", text).splitlines():
        if _FENCE.match(line):
            in_code = not in_code
            found.append([])
        elif in_code or line.lstrip().startswith("|"):
            found.append([])
        elif not line.strip() or line.startswith("#") or _ITEM.match(line):
            found.append([_ITEM.sub("", line).lstrip("# ")])
            if line.startswith("#"):
                found.append([])
        else:
            found[-1].append(line.strip())
    return [joined for lines in found if (joined := " ".join(lines).strip())]


def sentences(text: str) -> list[str]:
    """Return the sentences of a page in Markdown."""
    found = []
    for paragraph in paragraphs(text):
        # What is code may hold a full stop that ends nothing: it is one word for each that is
        # between its spaces.
        plain = _CODE.sub(
            lambda match: re.sub(r"[.!?](?=\s)", "", match[1]), _LINK.sub(r"\1", paragraph)
        )
        found += [sentence for sentence in _END.split(plain) if _WORD.search(sentence)]
    return found


def words(sentence: str) -> int:
    """Count what is between spaces and has a letter or a digit."""
    return sum(1 for word in sentence.split() if _WORD.search(word))


def percentile(lengths: list[int]) -> int:
    """Return the length that nine of ten sentences do not exceed."""
    ordered = sorted(lengths)
    return ordered[max(0, -(-len(ordered) * 9 // 10) - 1)] if ordered else 0


def complaint(name: str, text: str) -> str | None:
    """Return what is wrong with a page, or None."""
    lengths = [words(sentence) for sentence in sentences(text)]
    limit = README_WORDS if name == "README.md" else PAGE_WORDS
    if percentile(lengths) > limit:
        return f"{name}: one sentence in ten has more than {limit} words"
    if name == "README.md" and max(lengths, default=0) > limit:
        longest = max(sentences(text), key=words)
        return f"{name}: a sentence has {words(longest)} words, more than {limit}: {longest}"
    return None


def pages() -> list[Path]:
    """Return the pages that are held to this."""
    return [
        ROOT / "README.md",
        ROOT / "ARCHITECTURE.md",
        ROOT / "CONTRIBUTING.md",
        *sorted(ROOT.glob("docs/**/*.md")),
    ]


def main(arguments: list[str]) -> int:
    """Print a line a page; return 1 if a page is too hard to read."""
    complaints = []
    for page in [Path(name) for name in arguments] or pages():
        text = page.read_text()
        lengths = [words(sentence) for sentence in sentences(text)]
        name = str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else page.name
        print(
            f"{name:32} {len(lengths):4} sentences, 90th percentile {percentile(lengths):3} words, "
            f"longest {max(lengths, default=0):3}"
        )
        complaints.append(complaint(name, text))
    for found in filter(None, complaints):
        print(found, file=sys.stderr)
    return 1 if any(complaints) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
