"""Every example of README.md and docs/ is run, every link leads somewhere, README stays short."""

import ast
import doctest
import re
import sys
import warnings
from fnmatch import fnmatch

import pytest
import yaml
from support import ROOT

README, LIBRARY = ROOT / "README.md", ROOT / "ppleval"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def read(page) -> str:
    return page.read_text(encoding="utf-8")


def examples(page) -> doctest.DocTest:
    """The doctests of a page, each on its own line of the page."""
    kept, is_python = [], False
    for line in read(page).splitlines():
        is_fence = line.startswith("```")
        is_python = line == "```python" if is_fence else is_python
        kept.append(line if is_python and not is_fence else "")
    return doctest.DocTestParser().get_doctest("\n".join(kept), {}, page.name, str(page), 0)


def anchors(page) -> set[str]:
    """The fragments that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", read(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", [page for page in PAGES if ">>> " in read(page)], ids=lambda page: page.name
)
def test_the_examples_print_what_they_say(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # edge cases warn, as their comments say
        results = doctest.DocTestRunner().run(examples(page))
    assert results.failed == 0
    assert results.attempted == len(re.findall(r"^>>> ", read(page), flags=re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_into_the_repository_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:)([^)]+)\)", read(page))
    broken = []
    for target in targets:
        path, _, fragment = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        if not linked.exists() or (fragment and fragment not in anchors(linked)):
            broken.append(target)
    assert broken == []


def test_the_two_commands_are_those_of_the_makefile():
    assert set(re.findall(r"make ([a-z]+)", read(README))) == {"run", "test"}


def test_the_readme_links_every_page():
    linked = set(re.findall(r"\]\((docs/\w+\.md)\)", read(README)))
    assert linked == {f"docs/{page.name}" for page in PAGES[1:]}


def test_the_readme_is_short():
    assert len(read(README).splitlines()) <= 160


def test_the_first_perplexity_stands_on_the_first_screen():
    printed = [e for e in examples(README).examples if '["perplexity"]' in e.source and e.want]
    first = printed[0]
    assert re.search(r"\d\.\d", first.want)
    assert first.lineno + first.source.count("\n") + 1 < 30


def names_in_map(indent: str) -> list[str]:
    """What stands in the first column of the map, behind so much white space."""
    (tree,) = re.findall(r"## Map\n.*?```\n(.*?)```", read(README), flags=re.DOTALL)
    columns = re.findall(rf"^{indent}(\S+(?:, \S+)*)  ", tree, flags=re.MULTILINE)
    return sorted(name for names in columns for name in names.split(", "))


def entries(folder) -> list[str]:
    """The names in a folder, those of folders with a slash, but for what is hidden or ignored."""
    ignored = [*read(ROOT / ".gitignore").split(), ".*"]
    names = [path.name + "/" * path.is_dir() for path in folder.iterdir()]
    return sorted(name for name in names if not any(fnmatch(name, p) for p in ignored))


def test_the_map_has_every_room_and_every_root_entry():
    assert names_in_map("  ") == [e for e in entries(LIBRARY) if not e.startswith(("__", "py."))]
    assert names_in_map("") == [entry for entry in entries(ROOT) if entry != "README.md"]


def test_the_root_is_one_screen():
    assert len(entries(ROOT)) <= 20  # and .ci, .gitignore


def test_requirements_txt_lists_what_is_imported():
    """The Space installs nothing else; ppleval and demo lie beside app.py."""
    programs = [ROOT / "app.py", ROOT / "perplexity.py"]
    programs += [path for folder in (LIBRARY, ROOT / "demo") for path in folder.rglob("*.py")]
    nodes = [node for path in programs for node in ast.walk(ast.parse(read(path)))]
    imported = {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    names = {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names)
    names -= {"ppleval", "demo", "spaces"}  # the last is there on the machines of Spaces
    names -= {"matplotlib", "ray", "torchao", "triton"}  # asked for where they are needed
    names = {{"yaml": "PyYAML"}.get(name, name).replace("_", "-") for name in names}
    listed = re.findall(r"^[\w-]+", read(ROOT / "requirements.txt"), flags=re.MULTILINE)
    assert listed == sorted({name.replace("_", "-") for name in listed}, key=str.lower)
    assert set(listed) == names


def test_the_space_gets_what_the_demo_needs():
    """The front matter configures the Space; Python 3.10 would be its default."""
    front = yaml.safe_load(read(README).split("---")[1])
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    )
    assert front["sdk"] == "gradio"
    assert front["sdk_version"] == pins["gradio"]
    assert front["python_version"] == "3.11"
    assert (ROOT / front["app_file"]).exists()
