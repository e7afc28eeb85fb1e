"""Imports go down: CONTRIBUTING.md lists the rooms by floor, and the imports have to agree."""

import ast
import re

import pytest
from conftest import ROOT


def floors() -> dict[str, int]:
    """Room -> floor, as CONTRIBUTING.md has it."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = page.partition("floor by floor")[2].partition("Outside of the metric")[0]
    found = {}
    for number, text in re.findall(r"^(\d)\. (.*?)(?=^\d\. |\Z)", section, re.M | re.S):
        for room in re.findall(r"`([a-z_]+)`", text):
            assert room not in found, f"{room} is on two floors"
            found[room] = int(number)
    return found


def siblings_of(room: str) -> list[str]:
    """The rooms that a room imports."""
    tree = ast.parse((ROOT / f"{room}.py").read_text(encoding="utf-8"))
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names += [node.module] if node.module else [alias.name for alias in node.names]
    return names


FLOORS = floors()


def test_every_room_of_the_metric_is_on_a_floor():
    assert set(FLOORS) == {"perplexity", *siblings_of("perplexity")}


@pytest.mark.parametrize("room", sorted(FLOORS))
def test_a_room_knows_only_its_floor_and_those_below(room):
    above = [name for name in siblings_of(room) if FLOORS[name] > FLOORS[room]]
    assert above == []


@pytest.mark.parametrize("room", sorted(FLOORS))
def test_no_imports_go_in_a_circle(room):
    seen, waiting = set(), siblings_of(room)
    while waiting:
        name = waiting.pop()
        assert name != room
        if name not in seen:
            seen.add(name)
            waiting += siblings_of(name)
