"""Every example of README.md is run, and what it promises is there."""

import doctest
import re
import warnings

import yaml
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_examples_print_what_they_say(monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    examples = "\n".join(block for block in blocks if ">>>" in block)
    test = doctest.DocTestParser().get_doctest(examples, {}, "README.md", "README.md", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # edge cases warn, as their comments say
        results = doctest.DocTestRunner().run(test)
    assert results.failed == 0
    assert results.attempted > 25


def test_the_links_into_the_repository_lead_somewhere():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_two_commands_are_those_of_the_makefile():
    assert set(re.findall(r"make ([a-z]+)", README)) == {"run", "test"}


def test_the_space_gets_what_the_demo_needs():
    """The front matter configures the Space; Python 3.10 would be its default."""
    front = yaml.safe_load(README.split("---")[1])
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    )
    assert front["sdk"] == "gradio"
    assert front["sdk_version"] == pins["gradio"]
    assert front["python_version"] == "3.11"
    assert (ROOT / front["app_file"]).exists()
