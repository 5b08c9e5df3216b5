"""The plan names tests that exist and prove what it says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from contract import CONTRACT

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".ampcode"
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def sections() -> dict[int, list[tuple[str, str]]]:
    """Item → the tests named under it."""
    found: dict[int, list[tuple[str, str]]] = {}
    item = 0
    for line in (FOLDER / "PLANS.md").read_text().splitlines():
        if (head := re.match(r"(\d+)\. \*\*", line)) is not None:
            item = int(head[1])
            found[item] = []
        elif (named := NAMED.search(line)) is not None:
            found[item].append((named[1], named[2]))
    return found


def marked(path: str, name: str) -> bool:
    """Whether the test exists and is marked, itself, by its module or by its parameters."""
    tree = ast.parse((ROOT / path).read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    test = next((node for node in functions if node.name == name), None)
    if test is None:
        return False
    around = [ast.unparse(node) for node in tree.body if not isinstance(node, ast.ClassDef)]
    of_module = any("pytestmark" in text and ".contract(" in text for text in around)
    of_test = any(".contract(" in ast.unparse(decorator) for decorator in test.decorator_list)
    zoo = (ROOT / "tests" / "zoo.py").read_text()  # whose `rows` marks each row of a table
    of_rows = "contract" in zoo and any(
        "parametrize" in ast.unparse(d) and "rows(" in ast.unparse(d) for d in test.decorator_list
    )
    return of_module or of_test or of_rows


def test_the_plan_has_every_item_of_the_contract_and_a_test_for_each() -> None:
    assert sections().keys() == CONTRACT.keys()
    assert all(sections().values())


def test_every_test_that_the_plan_names_exists_and_is_marked() -> None:
    missing = [
        f"{path}::{name}" for tests in sections().values() for path, name in tests if not marked(path, name)
    ]
    assert not missing


def test_there_is_exactly_one_plan_and_no_code_beside_it() -> None:
    assert [path.name for path in FOLDER.rglob("*") if path.is_file()] == ["PLANS.md"]
