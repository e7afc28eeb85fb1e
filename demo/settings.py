"""Read and check app_config.yaml; an error names the wrong key.

Neither Gradio nor torch here, so that a mistake is told before they are imported, which takes
seconds.
"""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import yaml
from jinja2 import TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

ROOT = Path(__file__).resolve().parent.parent  # the directory of app_config.yaml
DTYPES = ("float32", "bfloat16", "float16")
THEMES = ("base", "citrus", "default", "glass", "monochrome", "ocean", "origin", "soft")
NAME_ON_THE_HUB = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # its owner, and its own


@dataclass(frozen=True)
class HeldOut:
    """What a model was measured on that it was not trained on."""

    texts: str  # which, such as "Python documentation"
    perplexity: float


@dataclass(frozen=True)
class Model:
    """A model that visitors can choose."""

    label: str
    id: str
    revision: str | None
    dtype: str | None
    chat_template: str | None
    description: str
    held_out: HeldOut | None

    @property
    def is_local(self) -> bool:
        """Whether it is a directory, and not on the Hub."""
        return (ROOT / self.id).is_dir()

    @property
    def source(self) -> str:
        """The path of the model's directory, or its name on the Hub."""
        return str(ROOT / self.id) if self.is_local else self.id


@dataclass(frozen=True)
class Limits:
    """How much one visitor may ask for; all above 0."""

    text_characters: int
    text_tokens: int
    file_mb: int
    uploads_mb: int
    array_mb: int
    time_s: int


@dataclass(frozen=True)
class Queue:
    """How many visitors are served at once, and how many wait; all above 0."""

    size: int
    per_address: int
    concurrency: int
    proxies: int | None


@dataclass(frozen=True)
class Example:
    """A text, or a conversation, to start from."""

    label: str
    text: str


@dataclass(frozen=True)
class Settings:
    """All of app_config.yaml."""

    title: str
    intro: str
    models: list[Model]
    default_model: str
    limits: Limits
    queue: Queue
    examples: list[Example]
    conversation_examples: list[Example]
    theme: str


def read_settings(path: Path) -> Settings:
    """The settings in a file.

    Raises:
        ValueError: in one line: the file cannot be read, is no YAML, or a key is missing, unknown,
            there twice or has a wrong value.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _EachKeyOnce)
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is no YAML: {' '.join(str(error).split())}") from error
    try:
        settings = _parsed(values, Settings, "")
        _check(settings)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    return settings


class _EachKeyOnce(yaml.SafeLoader):
    """Of a key that is there twice, YAML would take the last and say nothing."""

    def construct_mapping(self, node, deep=False):
        """Also raises YAMLError: a key is there twice."""
        names = [key.value for key, _ in node.value]
        for i, (key, _) in enumerate(node.value):
            if key.value in names[:i]:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value} is there twice", problem_mark=key.start_mark
                )
        return super().construct_mapping(node, deep)


def _parsed(value: Any, kind: Any, key: str) -> Any:
    """The value of a key, checked against the declared type of its field."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        known = {field.name: field.type for field in dataclasses.fields(kind)}
        if not isinstance(value, dict):
            raise ValueError(f"{key or 'the file'} must hold the keys {', '.join(known)}.")
        prefix = f"{key}." if key else ""
        for name in known.keys() - value.keys():
            raise ValueError(f"{prefix}{name} is missing.")
        for name in value.keys() - known.keys():
            raise ValueError(f"{prefix}{name} is no setting; there are {', '.join(known)}.")
        return kind(**{name: _parsed(value[name], known[name], prefix + name) for name in known})
    if get_origin(kind) is list:
        if not isinstance(value, list) or not value:
            raise ValueError(f"{key} must be a list with at least one entry, got {value!r}.")
        (entry,) = get_args(kind)
        return [_parsed(item, entry, f"{key}[{i}]") for i, item in enumerate(value)]
    if isinstance(kind, UnionType):  # str | None
        return None if value is None else _parsed(value, get_args(kind)[0], key)
    if kind is int and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"{key} must be a whole number above 0, got {value!r}.")
    if kind is float and (isinstance(value, bool) or not isinstance(value, float | int)):
        raise ValueError(f"{key} must be a number, got {value!r}.")
    if kind is str and (not isinstance(value, str) or not value.strip()):
        raise ValueError(f"{key} must be a text, got {value!r}.")
    return value


def _check(settings: Settings) -> None:
    """Check what involves several keys."""
    labels = [model.label for model in settings.models]
    for i, label in enumerate(labels):
        if label in labels[:i]:
            raise ValueError(f"models[{i}].label is taken already: {label!r}.")
    for i, model in enumerate(settings.models):
        if model.dtype is not None and model.dtype not in DTYPES:
            names = ", ".join(DTYPES)
            raise ValueError(f"models[{i}].dtype must be one of {names} or null: {model.dtype!r}.")
        if not model.is_local and not NAME_ON_THE_HUB.fullmatch(model.id):
            raise ValueError(
                f"models[{i}].id: there is no directory {model.id!r} next to the file. A name on "
                "the Hub has an owner, such as openai-community/gpt2."
            )
        _check_template(model.chat_template, f"models[{i}].chat_template")
    if settings.default_model not in labels:
        raise ValueError(
            f"default_model must be the label of a model, one of {labels}, "
            f"got {settings.default_model!r}."
        )
    for name in ("examples", "conversation_examples"):
        for i, example in enumerate(getattr(settings, name)):
            if len(example.text) > settings.limits.text_characters:
                raise ValueError(f"{name}[{i}].text is longer than limits.text_characters.")
    if settings.limits.uploads_mb < settings.limits.file_mb:
        raise ValueError("limits.uploads_mb must be at least limits.file_mb.")
    if settings.theme not in THEMES:
        raise ValueError(f"theme must be one of {', '.join(THEMES)}, got {settings.theme!r}.")


class _Generation(Extension):
    """The tag of transformers that marks what the assistant says."""

    tags = {"generation"}

    def parse(self, parser):
        """The statements inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


# What transformers compiles a template with.
_TEMPLATES = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
)


def _check_template(template: str | None, key: str) -> None:
    """Check the syntax."""
    if template is None:
        return
    try:
        _TEMPLATES.from_string(template)
    except TemplateSyntaxError as error:
        raise ValueError(f"{key} is no Jinja template: {error}") from error
