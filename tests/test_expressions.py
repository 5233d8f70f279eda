"""Every regular expression of the project, on texts made to slow it down.

They are collected from the source, so a new one is tested without a word here. One that is not written as a literal
has to be added to `BUILT`, and one whose text is cut before it may be added to `LONGEST`.
"""

from __future__ import annotations

import ast
import fnmatch
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import broker
from broker import logs
from broker.core import session
from broker.core.nested import Opened
from broker.logs import censor

SOURCE = Path(broker.__file__).parent
METHODS = ("match", "fullmatch", "search", "sub", "subn", "split", "findall", "finditer")

LONGEST = {"core/identity.py _HOP": 80}
"""Characters that reach an expression, where its module cuts the text first."""

BUILT = {
    *("logs.py censor", "core/nested.py Opened"),
    *("core/session.py _SESSION_ID", "core/session.py _CURSOR", "logs.py _SESSION_ID"),
}
"""Expressions that are built of other texts, tested below by hand."""

GLOBS_FROM_SETTINGS = {
    "core/checking.py check_models",
    "core/parameters.py is_open",
    "core/model_entry.py allows",
}
"""Functions that compare names with globs of the operator, tested below by hand."""

DEFAULT_LONGEST = 16_384
TOO_SLOW = 0.1
"""Seconds for a text of any of the sizes; what is linear takes a few milliseconds."""


class Expression(NamedTuple):
    """A regular expression and the methods by which it is used."""

    place: str
    pattern: str
    flags: int
    methods: tuple[str, ...]


def collect() -> tuple[list[Expression], set[str], set[str]]:
    """Return every expression of the Python source, the places of those that are not literals, and those of globs."""
    found, built, globs = [], set(), set()
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        for owner, call in calls(tree):
            place = f"{path.relative_to(SOURCE)} {owner}"
            name = called(call)
            if name.startswith("re.") and name != "re.escape":
                pattern = constant(call.args[0])
                if pattern is None:
                    built.add(place)
                    continue
                method = name.removeprefix("re.")
                used = methods_of(owner, tree) if method == "compile" else (method,)
                found.append(Expression(place, pattern, flags_of(call), used))
            elif name.startswith("fnmatch"):
                globs.add(place)
            found.extend(
                Expression(place, pattern, 0, ("search",))
                for keyword in call.keywords
                if keyword.arg == "pattern" and (pattern := constant(keyword.value)) is not None
            )
    return found, built, globs


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """Each call, with the name that it is assigned to or the function that it is in."""
    for statement in tree.body:
        owner = "module"
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                owner = name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                owner = name
        yield from ((owner, node) for node in ast.walk(statement) if isinstance(node, ast.Call))


def called(call: ast.Call) -> str:
    return ast.unparse(call.func)


def constant(node: ast.expr) -> str | None:
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return None
    if isinstance(value, bytes):  # of ASCII: it takes the same steps as the text
        return value.decode("ascii")
    return value if isinstance(value, str) else None


def flags_of(call: ast.Call) -> int:
    flags = [ast.unparse(node) for node in call.args[1:]] + [
        ast.unparse(word.value) for word in call.keywords if word.arg == "flags"
    ]
    names = re.findall(r"re\.([A-Z]+)", " ".join(flags))
    return sum(int(getattr(re, name)) for name in set(names))


def methods_of(name: str, tree: ast.Module) -> tuple[str, ...]:
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == name
        and node.attr in METHODS
    }
    return tuple(sorted(used)) or METHODS


BUNDLE = SOURCE / "web" / "client" / "client.js"
"""Made of `src/client.ts`, whose expressions are tested."""


def collect_scripts() -> list[Expression]:
    """Every regular expression literal of our scripts for browsers; Python reads what they are made of alike.

    Those of vendored releases are not ours: what they read is bounded by the page.
    """
    literal = re.compile(
        r"(?:[=(,:!&|?;{}]|\breturn)\s*/(?![/*])((?:\\.|\[(?:\\.|[^\]\\\n])*\]|[^/\\\n\[])+)/([a-z]*)"
    )
    return [
        Expression(f"{path.relative_to(SOURCE)}", pattern, re.IGNORECASE if "i" in flags else 0, METHODS)
        for path in sorted(path for kind in ("js", "ts", "tsx", "html") for path in SOURCE.rglob(f"*.{kind}"))
        if not {"node_modules", "dist", "vendor"} & {*path.parts} and path != BUNDLE
        for pattern, flags in literal.findall(path.read_text())
    ]


EXPRESSIONS, BUILT_IN_SOURCE, GLOBS_IN_SOURCE = collect()
ALL = [*EXPRESSIONS, *collect_scripts()]

UNITS = [
    *(
        "-",
        "a",
        "1",
        " ",
        "\n",
        ".",
        "_",
        ":",
        "/",
        "[",
        "=",
        "*",
        "\\",
        '"',
        "é",
        "a ",
        "1 ",
        "a.",
        "a:",
        "-1",
    ),
    *(
        "key",
        "key-",
        "key ",
        "key_",
        "token=",
        "sk-a",
        "bearer key ",
        "_key",
        "0123abcd",
        "0123abcd-",
        "://",
        "a://",
    ),
    *(
        "1-1",
        "[a]:1",
        "a:1,",
        "data:",
        "-----BEGIN ",
        "MII",
        '"kty"',
        "kib",
        " 1kib",
        "1/",
        "{a",
        "((",
        "a1-_",
    ),
]


def hostile(expression: Expression, size: int) -> Iterator[str]:
    words = re.findall(r"[A-Za-z0-9]{2,12}", expression.pattern)[:6]
    for unit in dict.fromkeys((*UNITS, *words)):
        body = (unit * (size // len(unit) + 1))[:size]
        yield from (body, f"key{body}\0", f"{body}!\0")


def seconds(expression: re.Pattern[str], method: str, text: str, runs: int = 3) -> float:
    arguments: tuple[Any, ...] = ("", text) if method in ("sub", "subn") else (text,)
    call = getattr(expression, method)
    best = float("inf")
    for _ in range(runs):
        started = time.process_time()
        result = call(*arguments)
        if method == "finditer":
            for _match in result:
                pass
        best = min(best, time.process_time() - started)
        if best < 0.001:
            break
    return best


def slow_text(expression: Expression) -> str | None:
    """Return what is wrong with an expression, or None."""
    compiled = re.compile(expression.pattern, expression.flags)
    longest = LONGEST.get(expression.place, DEFAULT_LONGEST)
    # Small steps first: what is exponential shows before it hangs, and what is quadratic before it takes minutes.
    small = [size for size in (8, 12, 16, 20, 24, 28, 32, 64, 128, 256, 1024, 2048, 4096) if size < longest]
    for method in expression.methods:
        for size in small:
            for text in hostile(expression, size):
                if seconds(compiled, method, text, 2) > TOO_SLOW:
                    return f"{method} of {size} characters {text[:20]!r}"
        for short, long in zip(hostile(expression, longest // 4), hostile(expression, longest), strict=True):
            one, four = seconds(compiled, method, short), seconds(compiled, method, long)
            if four > 0.002 and four > 9 * one:  # once more, for the machine may have been busy
                one, four = seconds(compiled, method, short, 7), seconds(compiled, method, long, 7)
            if four > TOO_SLOW or (four > 0.002 and four > 9 * one):
                return f"{method} of {long[:20]!r}: {one:.4f} s, then {four:.4f} s for four times as much"
    return None


@pytest.mark.parametrize("expression", ALL, ids=[f"{each.place} {n}" for n, each in enumerate(ALL)])
def test_an_expression_takes_no_more_than_linear_time(expression: Expression) -> None:
    assert slow_text(expression) is None


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?i)(?:\b|(?<=_))(?:sk|pk|key|bearer|token)[-_ :=]+(?=\S*\d)[A-Za-z0-9._~+/=-]{6,}",
        r"(a+)+b",
        r"(a|a)*b",
    ],
)
def test_an_expression_that_is_slow_is_found(pattern: str) -> None:
    assert slow_text(Expression("here", pattern, 0, ("search",))) is not None


def test_every_expression_is_collected() -> None:
    assert len(EXPRESSIONS) >= 15
    assert BUILT_IN_SOURCE <= BUILT, "say how these are tested, and add them"
    assert GLOBS_IN_SOURCE <= GLOBS_FROM_SETTINGS, "say how these are tested, and add them"


@pytest.mark.parametrize(
    ("compiled", "method"),
    [(session._SESSION_ID, "fullmatch"), (session._CURSOR, "fullmatch"), (logs._SESSION_ID, "sub")],
)
def test_session_ids_and_cursors_are_found_in_linear_time(compiled: re.Pattern[str], method: str) -> None:
    flags = compiled.flags & re.IGNORECASE
    assert slow_text(Expression("session", compiled.pattern, flags, (method,))) is None


def test_similar_secrets_are_removed_in_linear_time() -> None:
    cleaner = censor(["a" * size for size in range(4, 200)] + ["-" * 30 + "x"])

    def clean(size: int) -> float:
        started = time.process_time()
        cleaner(None, "info", {"event": "-" * size + "b" + "aaab" * (size // 4)})
        return time.process_time() - started

    one = min(clean(16_000) for _ in range(3))
    four = min(clean(64_000) for _ in range(3))
    assert four < max(9 * one, 0.002)


@pytest.mark.parametrize("glob", ["*a" * 20 + "b", "*" * 50 + "b", "[a-z]*" * 20 + "!", "*?" * 30 + "b"])
def test_a_glob_compares_the_longest_name_in_no_time(glob: str) -> None:
    expression = Expression("glob", fnmatch.translate(glob), 0, ("match",))
    compiled = re.compile(expression.pattern)
    assert max(seconds(compiled, "match", text) for text in hostile(expression, 256)) < 0.02


@pytest.mark.parametrize("glob", ["messages." + "*a" * 20 + "b", "*." + "*" * 50 + "b", "*.[a-z]*" * 8 + "!"])
def test_dotted_globs_compare_long_names_fast(glob: str) -> None:
    opened = Opened((glob, "provider.*"))
    for size in (256, 65_536):
        started = time.process_time()
        assert "messages." + "a" * size not in opened
        assert time.process_time() - started < 0.02
