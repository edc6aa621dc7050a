"""Tests match an error's class, ranks and identifiers, not its English, so that wording can improve.

Reads the syntax trees of all tests: no string that is compared with a message holds a sentence.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]

MOST_WORDS = 2
"""More plain words than these in a row are a sentence."""

FIXED = ("timed out after", "Connection closed by peer")
"""What programs look for in the messages of torch.distributed; the CHANGELOG promises it."""

WORD = re.compile(r"(?<![\w.`'\"\[/=-])[A-Za-z][a-z]*(?:'[a-z]+)?(?![\w(\[=/-]|\.\w)(?P<blank>\s*)")
"""A word of plain English. An identifier has an underline, a digit, a dot, a bracket, quotes or capitals."""

DISPLAYS = (ast.Tuple, ast.List, ast.Set, ast.Dict)
SCOPES = (ast.FunctionDef, ast.Lambda, ast.GeneratorExp, ast.ListComp, ast.SetComp, ast.DictComp)
METHODS = ("startswith", "endswith", "count", "index", "find", "partition", "removeprefix")


def sentence(pattern: str) -> str | None:
    """Return the first run of more than ``MOST_WORDS`` plain words, or None."""
    for phrase in FIXED:
        pattern = pattern.replace(phrase, "")
    text = re.sub(r"\\[bBAZ]", "", pattern)
    text = re.sub(r"\\s[+*]?", " ", text)
    text = re.sub(r"\\(.)", r"\1", text)

    run: list[re.Match[str]] = []
    for word in WORD.finditer(text):
        follows = bool(run) and run[-1].end() == word.start() and run[-1]["blank"] != ""
        run = [*run, word] if follows else [word]
        if len(run) > MOST_WORDS:
            return text[run[0].start() : word.end()].strip()
    return None


Given = ast.expr | ast.comprehension | ast.For
"""What binds a name: the value that is assigned, or the loop."""
Binding = tuple[ast.expr, Given]


class Patterns:
    """The strings of one file that are compared with text.

    A name is followed to where it is bound: by an assignment, a loop over literals, ``parametrize``, or a
    call of its function in the same file. A field is followed to where the file makes objects of its class.
    """

    def __init__(self, source: str) -> None:
        self._nodes: list[ast.AST] = [ast.parse(source)]
        self._parents: dict[ast.AST, ast.AST] = {}
        for node in self._nodes:  # which grows
            children = [child for child in ast.iter_child_nodes(node) if child._fields]
            self._nodes += children
            self._parents |= dict.fromkeys(children, node)
        self._followed: set[ast.AST] = set()  # at the moment: names may be bound in a circle
        self._index()

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """Yield line and text of each, once."""
        found = {
            literal
            for node in self._nodes
            for compared in self._compared(node)
            for literal in self._literals(compared)
        }
        yield from sorted(found)

    def _compared(self, node: ast.AST) -> Iterator[ast.expr]:
        """Yield what a node compares with a text."""
        if isinstance(node, ast.keyword) and node.arg == "match":
            yield node.value
        elif isinstance(node, ast.Compare):
            right = node.comparators[0]
            if isinstance(node.ops[0], ast.In | ast.NotIn):
                if not self._is_collection(right):
                    yield node.left
            elif _is_text_of_error(node.left):
                yield right
            elif _is_text_of_error(right):
                yield node.left
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of_module_re = isinstance(node.func.value, ast.Name) and node.func.value.id == "re"
            if node.func.attr in METHODS or (of_module_re and node.func.attr != "escape"):
                yield from node.args[:1]

    def _is_collection(self, node: ast.expr) -> bool:
        bound = self._bound(node) if isinstance(node, ast.Name) else [node]
        return any(isinstance(value, DISPLAYS) for value in bound)

    def _literals(self, node: ast.expr) -> Iterator[tuple[int, str]]:
        """Yield the string literals of which an expression's value may be made."""
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str):
                yield node.lineno, node.value
        elif isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
            yield node.lineno, "".join(map(str, parts))
        elif node not in self._followed:
            self._followed.add(node)
            for inner in list(self._inner(node)):
                yield from self._literals(inner)
            self._followed.discard(node)

    def _inner(self, node: ast.expr) -> Iterator[ast.expr]:
        """Yield the expressions that an expression's value is taken from."""
        if isinstance(node, ast.Name):
            yield from self._bound(node)
        elif isinstance(node, ast.Attribute):
            yield from self._given_to_fields(node.attr)
        elif isinstance(node, ast.BinOp):
            yield from (node.left, node.right)
        elif isinstance(node, ast.IfExp):
            yield from (node.body, node.orelse)
        elif isinstance(node, DISPLAYS):
            yield from _elements_of(node)
        elif isinstance(node, ast.Starred | ast.Subscript):
            yield node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield from (*node.args, node.func.value)  # re.escape(text), text.format(...)

    def _bound(self, name: ast.Name) -> list[ast.expr]:
        """Return what a name is bound to, by the innermost scope that binds it."""
        scope: ast.AST | None = name
        while scope is not None:
            scope = self._scope(scope)
            values = [
                value
                for target, given in self._bindings[scope, name.id]
                for value in self._placed(name.id, target, given)
            ]
            if isinstance(scope, ast.FunctionDef):
                values += self._arguments(name.id, scope)
            if values:
                return values
        return []

    def _index(self) -> None:
        """Note what binds each name in each scope, None for the module, and the calls by what they call."""
        self._bindings: dict[tuple[ast.AST | None, str], list[Binding]] = defaultdict(list)
        self._calls: dict[str, list[ast.Call]] = defaultdict(list)
        self._classes: list[tuple[str, list[str]]] = []
        for node in self._nodes:
            targets: list[ast.expr] = []
            given: Given = ast.Constant(None)
            if isinstance(node, ast.Assign):
                targets, given = node.targets, node.value
            elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
                targets, given = [node.target], node.value
            elif isinstance(node, ast.For | ast.comprehension):
                targets, given = [node.target], node
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                self._calls[node.func.id].append(node)
            elif isinstance(node, ast.ClassDef):
                lines = [line.target for line in node.body if isinstance(line, ast.AnnAssign)]
                fields = [target.id for target in lines if isinstance(target, ast.Name)]
                self._classes.append((node.name, fields))
            for target in targets:
                for name in {part.id for part in ast.walk(target) if isinstance(part, ast.Name)}:
                    self._bindings[self._scope(node), name].append((target, given))

    def _scope(self, node: ast.AST) -> ast.AST | None:
        """Return the scope around a node, None for the module."""
        scope = self._parents.get(node)
        while scope is not None and not isinstance(scope, SCOPES):
            scope = self._parents.get(scope)
        return scope

    def _placed(self, name: str, target: ast.expr, given: Given) -> Iterator[ast.expr]:
        """Yield those parts of what a target is given that go to a name."""
        if not isinstance(given, ast.comprehension | ast.For):
            yield from _parts(name, target, [given])
        elif given not in self._followed:
            self._followed.add(given)
            yield from _parts(name, target, list(self._elements(given.iter)))
            self._followed.discard(given)

    def _elements(self, node: ast.expr) -> Iterator[ast.expr]:
        """Yield the elements of a literal, of a name for one, of ``items()`` and ``values()``."""
        if isinstance(node, ast.Dict):
            yield from (key for key in node.keys if key is not None)
        elif isinstance(node, DISPLAYS):
            yield from _elements_of(node)
        elif isinstance(node, ast.Name | ast.Attribute):
            for value in list(self._inner(node)):
                yield from self._elements(value)
        elif (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "zip"
        ):
            columns = [list(self._elements(column)) for column in node.args]
            yield from map(_row, zip_longest(*columns, fillvalue=ast.Constant(None)))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            for table in self._bound(owner) if isinstance(owner, ast.Name) else [owner]:
                if isinstance(table, ast.Dict):
                    rows = zip(table.keys, table.values, strict=True)
                    yield from (
                        _row((key or value, value)) if node.func.attr == "items" else value
                        for key, value in rows
                    )

    def _arguments(self, name: str, function: ast.FunctionDef) -> list[ast.expr]:
        """Return what a function's parameter is given: by ``parametrize``, and by calls in this file."""
        names = [argument.arg for argument in function.args.args + function.args.kwonlyargs]
        if name not in names:
            return []
        values = list(self._given(name, names, function.name))
        for decorator in function.decorator_list:
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith("ametrize"):
                values += self._column(name, *decorator.args[:2])
        return values

    def _column(self, name: str, names: ast.expr, rows: ast.expr) -> Iterator[ast.expr]:
        columns = re.findall(r"\w+", ast.unparse(names))
        if name not in columns:
            return
        for row in self._elements(rows):
            if isinstance(row, ast.Call):  # pytest.param
                yield row.args[columns.index(name)]
            elif len(columns) == 1:
                yield row
            elif isinstance(row, ast.Tuple | ast.List):
                yield row.elts[columns.index(name)]

    def _given_to_fields(self, name: str) -> Iterator[ast.expr]:
        """Yield what a dataclass's field of that name is given."""
        for kind, fields in self._classes:
            if name in fields:
                yield from self._given(name, fields, kind)

    def _given(self, name: str, names: list[str], called: str) -> Iterator[ast.expr]:
        """Yield what the calls of a function or class give for a parameter."""
        for call in self._calls[called]:
            places = dict(zip(names, call.args, strict=False))
            places |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
            if name in places:
                yield places[name]


def _is_text_of_error(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "str"


def _elements_of(node: ast.expr) -> list[ast.expr]:
    return node.values if isinstance(node, ast.Dict) else node.elts  # type: ignore[attr-defined]


def _row(cells: tuple[ast.expr, ...]) -> ast.Tuple:
    return ast.Tuple(list(cells), ast.Load())


def _parts(name: str, target: ast.expr, values: list[ast.expr]) -> Iterator[ast.expr]:
    if isinstance(target, ast.Name) and target.id == name:
        yield from values
    elif isinstance(target, ast.Tuple):
        rows = [value.elts for value in values if isinstance(value, ast.Tuple | ast.List)]
        for place, part in enumerate(target.elts):
            yield from _parts(name, part, [row[place] for row in rows if place < len(row)])


def sentences(source: str) -> list[tuple[int, str]]:
    """Return line and words of each sentence with which a file compares messages."""
    return [(line, words) for line, text in Patterns(source) if (words := sentence(text))]


def test_tests_match_no_sentences() -> None:
    found = [
        f"{path.relative_to(TESTS.parent)}:{line}: {words!r}"
        for path in sorted(TESTS.rglob("*.py"))
        for line, words in sentences(path.read_text())
    ]
    assert not found, "\n".join(
        ["match class, ranks and what the caller wrote, not words:", *found]
    )


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        (r"group 'g' \(rank 1\): it cannot be \w+", "it cannot be"),
        ("wait again; the operation goes on", "the operation goes"),
        (r"rank 2 .*has another\s+secret", "has another secret"),
        ("{} can't start new", "can't start new"),
        (r"^allreduce \(rank 0\): op .*'sum'", None),
        (r"leaf \['a'\]\[1\] .*float32\[3\]", None),
        (r"call remove\(\) and sync_gradients\(\) again", None),
        ("COLLTENSOR_LIBRARY names libcolltensor.so", None),
        ("recv timed out after 2 s", None),
    ],
)
def test_what_a_sentence_is(pattern: str, found: str | None) -> None:
    assert sentence(pattern) == found


PLACES = {
    "raises": "with pytest.raises(E, match={}): pass",
    "warns": "with pytest.warns(W, match='rank ' + {}): pass",
    "in": "assert {} in str(error)",
    "not in": "assert all({} not in line for line in lines)",
    "equal": "assert str(error.value) == {}",
    "re": "assert re.search({}, text)",
    "method": "assert message.startswith({})",
    "name": "words = {}\nassert words in message",
    "constant": "WORDS = {}\ndef test():\n assert re.escape(WORDS) in message",
    "loop": "for kind, words in ((E, {}), (F, 'b')):\n assert words in message",
    "zip": "for line, words in zip(lines, ['a', {}]):\n assert words in line",
    "zip of literals": "for line, words in zip(['a'], [{}]):\n assert words in line",
    "items": "TABLE = {{'a': ('b', {})}}\nfor _, (_, words) in TABLE.items():\n assert words in m",
    "comprehension": "assert all(words in m for words in [{}])",
    "parametrize": "@pytest.mark.parametrize('words', [{}])\ndef test(words):\n assert words in m",
    "columns": "@pytest.mark.parametrize(('a', 'b'), [(1, {})])\ndef test(a, b):\n re.match(b, m)",
    "param": "@pytest.mark.parametrize('a,b', [pytest.param(1, {}, id='c')])\ndef test(a, b):\n b in m",
    "call": "def check(words):\n assert words in message\ncheck({})",
    "field": "class Row:\n words: tuple\nROWS = [Row(({},))]\nfor row in ROWS:\n for w in row.words: re.search(w, m)",
}


@pytest.mark.parametrize("place", PLACES)
def test_where_one_is_found(place: str) -> None:
    words = "one that nobody wrote"
    assert sentences(PLACES[place].format(repr(words), repr(words))), place
    assert not sentences(PLACES[place].format("'sendrecv'", "'sendrecv'"))


@pytest.mark.parametrize(
    "source",
    [
        "assert {} in ('a', 'b')",
        "SLOW = ['a']\nassert {} not in SLOW",
        "raise ValueError({})",
        "assert found, {}",
        "for name, words in [({}, 'b')]:\n assert words in message",
        "@pytest.mark.parametrize(('name', 'words'), [({}, 'b')])\ndef test(name, words): words in m",
    ],
)
def test_where_none_is(source: str) -> None:
    assert not sentences(source.format("'one that nobody wrote'"))
