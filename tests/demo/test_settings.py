"""app_config.yaml is checked before anything starts, and a message names the key."""

import copy
import re
import subprocess
import sys

import pytest
import yaml
from jinja2 import TemplateSyntaxError
from support import ROOT
from transformers.utils.chat_template_utils import _compile_jinja_template

from demo.settings import read_settings

GOOD = yaml.safe_load((ROOT / "app_config.yaml").read_text(encoding="utf-8"))


def read(tmp_path, values):
    path = tmp_path / "app_config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return read_settings(path)


def test_the_file_of_the_repository_is_good(tmp_path):
    settings = read_settings(ROOT / "app_config.yaml")
    assert settings == read(tmp_path, GOOD)
    assert settings.models[0].id == "tiny_model"
    assert settings.limits.text_characters == GOOD["limits"]["text_characters"]
    fluent, shuffled, _ = (example.text for example in settings.examples)
    assert shuffled != fluent
    assert sorted(shuffled.split()) == sorted(fluent.split())


def test_the_bundled_model_has_what_was_measured_on_held_out_text():
    """The number of its card, which `make run` prints; see test_tiny_model.py."""
    card = (ROOT / "tiny_model" / "README.md").read_text(encoding="utf-8")
    measured = float(re.search(r"\(perplexity ([\d.]+) over", card).group(1))
    settings = read_settings(ROOT / "app_config.yaml")
    assert settings.models[0].held_out.perplexity == measured


def test_every_key_is_documented():
    text = (ROOT / "app_config.yaml").read_text(encoding="utf-8")
    for model_key in GOOD["models"][0]:
        assert f"#   {model_key}: " in text
    for group in ("limits", "queue"):
        for key in GOOD[group]:
            assert any(key in line and "#" in line for line in text.splitlines())


MISTAKES = [
    (("limits", "time_s"), None, r"limits\.time_s must be a whole number above 0, got None"),
    (("limits", "file_mb"), 0, r"limits\.file_mb must be a whole number above 0, got 0"),
    (("limits", "file_mb"), True, r"limits\.file_mb must be a whole number above 0, got True"),
    (("limits", "file_mb"), "64", r"limits\.file_mb must be a whole number above 0, got '64'"),
    (("limits",), 5, r"limits must hold the keys text_characters, text_tokens, file_mb"),
    (("limits", "uploads_mb"), 63, r"limits\.uploads_mb must be at least limits\.file_mb"),
    (("queue", "sise"), 5, r"queue\.sise is no setting; there are size, per_address"),
    (("queue", "proxies"), 0, r"queue\.proxies must be a whole number above 0, got 0"),
    (("models", 1, "id"), "tiny_modell", r"models\[1\]\.id: there is no directory 'tiny_modell'"),
    (("models", 1, "id"), "./models/tiny", r"models\[1\]\.id: there is no directory"),
    (("models", 1, "id"), "/models/tiny", r"models\[1\]\.id: there is no directory"),
    (("title",), "", r"title must be a text, got ''"),
    (("title",), 3, r"title must be a text, got 3"),
    (("models",), [], r"models must be a list with at least one entry"),
    (("models", 1, "label"), GOOD["models"][0]["label"], r"models\[1\]\.label is taken"),
    (("models", 0, "dtype"), "int8", r"models\[0\]\.dtype must be one of float32, .* 'int8'"),
    (("models", 0, "revision"), 7, r"models\[0\]\.revision must be a text, got 7"),
    (("models", 0, "trust_remote_code"), True, r"models\[0\]\.trust_remote_code is no setting"),
    (("models", 0, "chat_template"), "", r"models\[0\]\.chat_template must be a text, got ''"),
    (
        ("models", 1, "chat_template"),
        "{% generation %}{{ messages",
        r"models\[1\]\.chat_template is no Jinja template: unexpected end",
    ),
    (("models", 0, "held_out"), 71, r"models\[0\]\.held_out must hold the keys texts, perplexity"),
    (("models", 0, "held_out", "perplexity"), "71", r".*perplexity must be a number, got '71'"),
    (("models", 0, "held_out", "perplexity"), True, r".*perplexity must be a number, got True"),
    (("default_model",), "GPT-9", r"default_model must be the label of a model.*'GPT-9'"),
    (("examples", 1, "text"), "x" * 30000, r"examples\[1\]\.text is longer than limits"),
    (("conversation_examples", 0, "text"), "x" * 30000, r"conversation_examples\[0\]\.text is lon"),
    (("theme",), "neon", r"theme must be one of base, .* got 'neon'"),
]


@pytest.mark.parametrize(("place", "value", "message"), MISTAKES)
def test_a_mistake_is_named(tmp_path, place, value, message):
    values = copy.deepcopy(GOOD)
    *parents, last = place
    target = values
    for parent in parents:
        target = target[parent]
    target[last] = value
    with pytest.raises(ValueError, match=r"^app_config\.yaml: " + message):
        read(tmp_path, values)


@pytest.mark.parametrize("key", GOOD)
def test_every_key_is_needed(tmp_path, key):
    values = {name: value for name, value in GOOD.items() if name != key}
    with pytest.raises(ValueError, match=f"{key} is missing"):
        read(tmp_path, values)


@pytest.mark.parametrize("key", GOOD["models"][0])
def test_every_key_of_a_model_is_needed(tmp_path, key):
    values = copy.deepcopy(GOOD)
    del values["models"][1][key]
    with pytest.raises(ValueError, match=rf"models\[1\]\.{key} is missing"):
        read(tmp_path, values)


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ bos_token + messages[0]['content'] }}",
        "{% generation %}{{ raise_exception('no') }}{% endgeneration %}",
        *(path.read_text() for path in sorted((ROOT / "tests/chat_templates").glob("*.jinja"))),
    ],
)
def test_templates_that_a_model_may_have(tmp_path, template):
    values = copy.deepcopy(GOOD)
    values["models"][0]["chat_template"] = template
    assert read(tmp_path, values).models[0].chat_template == template


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% break %}{% endfor %}",
        "{% generation %}",
        "{% generation %}{% endfor %}",
        "{% unknown %}",
        "{{ messages | nothing_like_that }}",
        "{% if %}",
    ],
)
def test_a_template_is_refused_where_transformers_refuses_its_syntax(tmp_path, template):
    values = copy.deepcopy(GOOD)
    values["models"][0]["chat_template"] = template
    try:
        _compile_jinja_template(template)
    except TemplateSyntaxError as error:
        with pytest.raises(ValueError, match=re.escape(f"is no Jinja template: {error}")):
            read(tmp_path, values)
    else:
        read(tmp_path, values)


@pytest.mark.parametrize("line", ["theme: soft", "limits: {}", "queue: {size: 1, size: 2}"])
def test_a_key_that_is_there_twice(tmp_path, line):
    """YAML itself would take the last one."""
    path = tmp_path / "app_config.yaml"
    text = (ROOT / "app_config.yaml").read_text(encoding="utf-8")
    path.write_text(f"{text}\n{line}\n", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"app_config\.yaml is no YAML: the key \w+ is there twice"
    ):
        read_settings(path)


def test_no_yaml_at_all(tmp_path):
    path = tmp_path / "app_config.yaml"
    with pytest.raises(ValueError, match=r"^app_config\.yaml cannot be read: No such file"):
        read_settings(path)
    for content in (b"title: [", b"title: \xff", b"a: 1\n b: 2", b"{[]: 1}"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"app_config\.yaml is no YAML.*") as error:
            read_settings(path)
        assert "\n" not in str(error.value)
    path.write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="the file must hold the keys title, intro"):
        read_settings(path)


def test_the_program_tells_a_mistake_at_once(tmp_path):
    """One line, before torch and Gradio are imported."""
    program = (
        "import sys, app\n"
        "from demo import settings\n"
        f"app.ROOT = settings.Path({str(tmp_path)!r})\n"
        "try: app.main()\n"
        "finally: assert not {'torch', 'gradio', 'transformers'} & sys.modules.keys()\n"
    )
    (tmp_path / "app_config.yaml").write_text("title: Perplexity\n", encoding="utf-8")
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("app_config.yaml: ")
    assert done.stderr.count("\n") == 1
