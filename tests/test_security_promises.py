"""Each promise of SECURITY.md names tests, and each of these exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::([^`]+)`")  # `test_x[row]` too: it is found nowhere
PROMISE = re.compile(r"- \*\*(.+?)\*\*")


def promises() -> dict[str, list[tuple[str, str]]]:
    """Promise → the tests named under it."""
    page = (ROOT / "SECURITY.md").read_text()
    _, _, below = page.partition("\n## Promises\n")
    section, _, _ = below.partition("\n## ")
    found: dict[str, list[tuple[str, str]]] = {}
    for item in re.split(r"^(?=- )", section, flags=re.MULTILINE)[1:]:
        promise = PROMISE.match(item.replace("\n", " "))
        assert promise is not None, f"it does not begin with a promise: {item}"
        assert promise[1] not in found, promise[1]
        found[promise[1]] = NAMED.findall(item)
    return found


@cache
def functions_of(path: str) -> frozenset[str]:
    """The test functions of a file."""
    file = ROOT / path
    if not file.is_file():
        return frozenset()
    functions = [
        node
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return frozenset(node.name for node in functions if node.name.startswith("test_"))


def test_every_promise_names_a_test() -> None:
    assert len(promises()) > 20
    assert not [promise for promise, tests in promises().items() if not tests]


def test_every_test_that_a_promise_names_exists() -> None:
    named = [test for tests in promises().values() for test in tests]
    assert not [f"{path}::{name}" for path, name in named if name not in functions_of(path)]


def test_no_test_is_named_anywhere_else_on_the_page() -> None:
    assert NAMED.findall((ROOT / "SECURITY.md").read_text()) == [
        test for tests in promises().values() for test in tests
    ]
