"""Every example of README.md and docs/ is run, every link leads somewhere, README stays short."""

import doctest
import re
import warnings

import pytest
import yaml
from conftest import ROOT

README = ROOT / "README.md"
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


def test_the_map_has_every_module_and_folder():
    (tree,) = re.findall(r"## Map\n\n```\n(.*?)```", read(README), flags=re.DOTALL)
    named = {
        name
        for names in re.findall(r"^(\S+(?:, \S+)*)  ", tree, flags=re.MULTILINE)
        for name in names.split(", ")
    }
    assert [name for name in named if not list(ROOT.glob(name))] == []
    assert {path.name for path in ROOT.glob("*.py")} <= {
        path.name for name in named for path in ROOT.glob(name)
    }


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
