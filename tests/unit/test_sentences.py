"""tools/sentences.py: what it counts, and that it can fail."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
LONG = "word " * 40 + "end.\n"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sentences", ROOT / "tools" / "sentences.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sentences"] = module
    spec.loader.exec_module(module)
    return module


def test_what_a_sentence_is(tool: ModuleType) -> None:
    text = (
        "# A heading\nOne `np.ones(3)` here, e.g. this.\nTwo [words](https://example.org/a.b?c)! Three?\n\n"
        "| a table. | is none. |\n| --- | --- |\n```python\nx = 1. # Not this.\n```\n- an item\n  goes on\n"
        "- **Bold.** More\n<!-- a comment. -->\n"
    )
    assert tool.sentences(text) == [
        "A heading",
        "One np.ones(3) here, e.g. this.",
        "Two words!",
        "Three?",
        "an item goes on",
        "**Bold.",
        "More",
    ]
    assert tool.words("One `np.ones(3)` - here, e.g. this.") == 5


def test_the_percentile(tool: ModuleType) -> None:
    assert tool.percentile(list(range(1, 11))) == 9
    assert tool.percentile([7]) == 7
    assert tool.percentile([]) == 0


def test_long_sentences_fail(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("Short. " * 9 + LONG)
    assert tool.main([str(page)]) == 0  # one in ten may be long
    page.write_text("Short. " * 8 + 2 * LONG)
    assert tool.main([str(page)]) == 1
    assert "page.md: " in capsys.readouterr().err


def test_one_long_sentence_fails_in_the_readme(tool: ModuleType) -> None:
    text = "Short. " * 99 + "\n\n" + LONG
    assert tool.complaint("docs/page.md", text) is None
    assert " 41 " in tool.complaint("README.md", text)
