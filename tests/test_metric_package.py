"""One way to the metric: its files are loaded once, from the package that evaluate makes."""

import ast
import re
import sys
from pathlib import Path

from conftest import ROOT, SCRIPT, load, sibling

FOLDERS = (".", "demo", "tests", "tests/workers", "benchmarks", "examples")


def imported_when_run(path: Path) -> set[str]:
    """The modules that a file imports by an absolute name, other than for the type checker."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names, nodes = set(), [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            nodes += ast.iter_child_nodes(node)
    return names


def test_no_file_imports_a_second_copy_of_the_metric():
    """`from totals import NllTotals` would give a class that the metric's own one refuses."""
    lines = Path(SCRIPT).read_text(encoding="utf-8").splitlines()
    of_metric = {line.split()[1][1:] for line in lines if line.startswith("from .")}
    of_metric.add("perplexity")
    paths = [path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")]
    second = {path.name: imported_when_run(path) & of_metric for path in paths}
    assert {name: found for name, found in second.items() if found} == {}


def test_no_test_edits_the_search_path():
    paths = (ROOT / "tests").rglob("*.py")
    edit = re.compile(r"sys\.path\.(insert|append|extend)|sys\.path *\+?= ")
    assert [path.name for path in paths if edit.search(path.read_text(encoding="utf-8"))] == []


def test_a_sibling_is_the_one_that_the_metric_uses():
    metric = sys.modules[type(load()).__module__]
    assert sibling("totals").NllTotals is metric.NllTotals
    totals = sibling("totals").NllTotals.from_sequences([1.0], [1.0], 1)
    assert (totals + metric.NllTotals()).num_tokens == 1
