"""Every example of README.md and docs/ is run, every link leads somewhere, README stays short; each
option, key of a result and exit status is in them."""

import ast
import doctest
import inspect
import re
import sys
import warnings
from argparse import SUPPRESS, _SubParsersAction
from dataclasses import fields
from fnmatch import fnmatch

import pytest
import yaml
from support import ROOT

from ppleval import Perplexity
from ppleval.arguments import UNSET
from ppleval.cli import main as cli_main
from ppleval.cli.options import build_parser
from ppleval.logits.options import Options
from ppleval.stats.pairs import PairSums, pair_result
from ppleval.texts.compare import TextComparison
from ppleval.texts.options import TextOptions
from ppleval.texts.score import TextScore
from ppleval.texts.words import Word

README, LIBRARY = ROOT / "README.md", ROOT / "ppleval"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
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
    (tree,) = re.findall(r"## Map\n.*?```\n(.*?)```", read(CONTRIBUTING), flags=re.DOTALL)
    columns = re.findall(rf"^{indent}(\S+(?:, \S+)*)  ", tree, flags=re.MULTILINE)
    return sorted(name for names in columns for name in names.split(", "))


def entries(folder) -> list[str]:
    """The names in a folder, those of folders with a slash, but for what is hidden or ignored."""
    ignored = [*read(ROOT / ".gitignore").split(), ".*"]
    names = [path.name + "/" * path.is_dir() for path in folder.iterdir()]
    return sorted(name for name in names if not any(fnmatch(name, p) for p in ignored))


def test_the_map_has_every_room_and_every_root_entry():
    assert names_in_map("  ") == [e for e in entries(LIBRARY) if not e.startswith(("__", "py."))]
    assert names_in_map("") == [entry for entry in entries(ROOT) if entry != CONTRIBUTING.name]


def rows(page, header: str) -> list[list[str]]:
    """The cells of all tables of a page under docs/ whose header begins so."""
    found, is_here = [], False
    for line in read(ROOT / "docs" / page).splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if line.startswith(header):
            is_here = True
        elif not cells:
            is_here = False
        elif is_here and not set(cells[0]) <= set("-: "):
            found.append(cells)
    return found


def names(cell: str) -> list[str]:
    """What stands in a cell as code."""
    return re.findall(r"`([^`]+)`", cell)


def documented_options() -> dict[str, str]:
    """The default of each option of texts and of logits, as the tables have it."""
    found = {}
    for page in ("logits.md", "texts.md"):
        for cell, default, _ in rows(page, "| option | default |"):
            found |= dict.fromkeys(names(cell), default)
    return found


WITH_OPTIONS = ["__init__", "compute", "score", "compare", "compare_tokens", "save_base"]
WITH_OPTIONS += ["text_scorer", "text_comparer"]


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_the_tables_have_each_option_with_its_default(name):
    documented = documented_options()
    defaults = {f.name: f.default for kind in (TextOptions, Options) for f in fields(kind)}
    known = ["self", "unknown", "predictions", "references", "sample_weight", "path"]
    for parameter in inspect.signature(getattr(Perplexity, name)).parameters.values():
        if parameter.name in known:
            continue
        assert parameter.name in documented, f"{parameter.name} of {name} is in no table"
        default = parameter.default
        default = defaults[parameter.name] if default is UNSET else default
        stated = documented[parameter.name]
        if stated != "found out":
            assert ast.literal_eval(stated.strip("`")) == default, parameter.name


def test_the_tables_have_no_option_that_is_gone():
    methods = [getattr(Perplexity, name) for name in ("compute", "score", "compare")]
    taken = {name for method in methods for name in inspect.signature(method).parameters}
    assert set(documented_options()) <= taken


def subcommands():
    """The parser of each subcommand, by its name."""
    (action,) = (
        action for action in build_parser()._actions if isinstance(action, _SubParsersAction)
    )
    return action.choices


def test_the_page_of_the_command_has_each_option():
    stated = {}
    for cell, default, _ in rows("cli.md", "| option | default |"):
        (code,) = names(cell)
        stated[code.split()[0]] = default
    taken = {}
    for parser in subcommands().values():
        for action in parser._actions:
            if action.default != SUPPRESS:  # --help
                name = action.option_strings[-1] if action.option_strings else action.metavar
                taken[name] = action
    assert set(stated) == set(taken)
    assert {name for name in stated if stated[name] == "required"} == {
        name for name, action in taken.items() if action.required and action.option_strings
    }


def test_the_page_of_the_command_has_each_exit_status():
    (main,) = (
        node
        for node in ast.parse(inspect.getsource(cli_main)).body
        if isinstance(node, ast.FunctionDef) and node.name == "main"
    )
    returned = [node.value for node in ast.walk(main) if isinstance(node, ast.Return)]
    statuses = {node.value for node in returned if isinstance(node, ast.Constant)}
    stated = {int(status) for status, _ in rows("cli.md", "| status |")}
    assert stated == statuses | {2}  # argparse's


TEXTS = ["Return the number of items in the list.", "The cat sat on the mat."] * 10
CALLS = {
    "plain": {},
    "cut": {"max_length": 4},
    "grouped": {"groups": ["a", "b"] * 10, "positions": True},
    "gptq": {"preset": "gptq", "window": 16},
    "llama.cpp": {"preset": "llama.cpp", "window": 16},
}


def keys(result: dict) -> set[str]:
    """The keys of a result and of those of its groups and buckets."""
    found = set(result)
    for name in ("groups", "positions"):
        found |= {key for part in result.get(name, {}).values() for key in keys(part)}
    return found


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_the_page_of_results_has_each_key(call):
    stated = {name for cell, _ in rows("results.md", "| key |") for name in names(cell)}
    contexts = None if "preset" in call else ["a"] * len(TEXTS)
    model = {"model_id": str(ROOT / "tiny_model")}
    result = Perplexity().compute(predictions=TEXTS, contexts=contexts, **model, **call)
    assert keys(result) <= stated


def is_named(key: str, stated: set[str]) -> bool:
    """Whether a key of a comparison is stated, or made as the page says."""
    if key in stated:
        return True
    plain = re.sub("_(ci_low|ci_high|standard_error)$", "", key).removeprefix("base_")
    plain = plain.removesuffix("_difference")
    is_quantile = re.fullmatch(r"(kl|delta_p)_(median|min|max|p\d+(_\d)?)", plain)
    return plain in stated or is_quantile is not None


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_the_page_of_comparisons_has_each_key(call):
    page = [*rows("compare.md", "| name |"), *rows("compare.md", "| question |")]
    stated = {name for row in page for cell in row[:2] for name in names(cell)}
    stated |= {"num_tokens", "num_sequences", "num_bytes", "signature"}  # of every result
    model = str(ROOT / "tiny_model")
    result = Perplexity().compare(TEXTS, base_id=model, model_id=model, **call)
    unstated = [key for key in keys(result) if not is_named(key, stated)]
    assert unstated == []


def test_the_page_of_comparisons_has_the_keys_of_different_tokenizers():
    sums = [s for _, s in Perplexity().text_scorer(model_id=str(ROOT / "tiny_model")).sums(TEXTS)]
    found = pair_result([PairSums(**vars(text), base=text) for text in sums])
    stated = {name for cell, _ in rows("compare.md", "| name |") for name in names(cell)}
    unstated = [key for key in found if not is_named(key, stated | {"num_tokens"})]
    assert unstated == ["num_sequences", "num_bytes"]  # of every result


@pytest.mark.parametrize(
    ("kind", "page"),
    [(TextScore, "words.md"), (Word, "words.md"), (TextComparison, "compare.md")],
)
def test_the_fields_of_what_comes_back_for_a_text_are_named(kind, page):
    text = read(ROOT / "docs" / page)
    assert [f.name for f in fields(kind) if f"`{f.name}`" not in text] == []


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
    names -= {"matplotlib", "peft", "ray", "torchao", "triton"}  # asked for where they are needed
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
