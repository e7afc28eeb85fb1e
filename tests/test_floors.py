"""Imports of the library go down or stay on their floor, and never in a circle."""

import ast
from pathlib import Path

import pytest
from support import ROOT

FLOORS = {
    "__init__": 0,
    "distributed": 0,
    "shown": 0,
    "user_warnings": 0,
    "stats": 1,
    "show": 1,
    "logits": 2,
    "models": 3,
    "texts": 4,
    "trainer": 5,
    "arguments": 6,
    "pending": 6,
    "metric": 6,
    "evaluate_files": 6,
    "cli": 7,
    "ray": 7,
    "__main__": 7,
}
# What a room does without, directly or not.
WITHOUT = {
    "stats": {"torch", "transformers", "datasets", "evaluate"},
    "show": {"torch", "transformers", "datasets", "evaluate"},
    "logits": {"transformers", "datasets", "evaluate"},
}
LIBRARY = ROOT / "ppleval"
FILES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
    for path in sorted(LIBRARY.rglob("*.py"))
}


def imports_of(path: Path) -> list[str]:
    """The modules that a file imports when it runs, also within functions."""
    names, nodes = [], [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names += [name if name in FILES else node.module for name in inner]
        nodes += ast.iter_child_nodes(node)
    return names


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def own(names: list[str]) -> list[str]:
    return [name for name in names if name.partition(".")[0] == "ppleval"]


def test_every_room_is_on_a_floor():
    assert {room_of(module.removesuffix(".__init__")) for module in FILES} == set(FLOORS)


@pytest.mark.parametrize("module", FILES)
def test_a_room_knows_only_its_floor_and_those_below(module):
    floor = FLOORS[room_of(module.removesuffix(".__init__"))]
    names = own(imports_of(FILES[module]))
    assert [name for name in names if FLOORS[room_of(name)] > floor] == []


@pytest.mark.parametrize("module", FILES)
def test_no_imports_go_in_a_circle(module):
    seen, waiting = set(), own(imports_of(FILES[module]))
    while waiting:
        name = waiting.pop()
        assert name != module
        if name in FILES and name not in seen:
            seen.add(name)
            waiting += own(imports_of(FILES[name]))


@pytest.mark.parametrize("room", WITHOUT)
def test_what_a_room_does_without(room):
    for module, path in FILES.items():
        if room_of(module) == room:
            names = {name.partition(".")[0] for name in imports_of(path)}
            assert names & WITHOUT[room] == set(), module
