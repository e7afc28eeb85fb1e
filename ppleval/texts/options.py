"""The settings of texts and a model that change the number, and their checks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ppleval.logits.options import dtype_name, positive_int
from ppleval.logits.tensors import check_backend
from ppleval.texts.inputs import plain
from ppleval.texts.presets import PRESETS, Preset
from ppleval.texts.windows import check_window

JOIN_CONTEXTS = ("text", "ids")


PSEUDO = ("original", "within_word_l2r")


@dataclass(frozen=True)
class TextOptions:
    """The settings of texts and a model that change the number.

    preset: whose conventions to follow, a name of PRESETS; None for this module's own.
    add_start_token: True puts the tokenizer's BOS in front of each text, an id that id, False none.
    join_contexts: "text" tokenises a context and its text as one string, "ids" each by itself.
    max_length: the most tokens of a text, start token and context included; None never cuts.
    window: how many tokens the model reads at once; None for the model's context length.
    stride: how many tokens each further window scores; None for half of the window.
    start_each_window: whether the start token takes the place of the first id of each window that
        begins inside a text; None for yes, or as the preset says.
    positions: True to also report by position, in buckets of 0, 1, 2-3, 4-7... tokens of context;
        or the edges of the buckets. It changes no number.
    conversations: whether the texts are conversations, lists of messages.
    chat_template: a template for them in place of the tokenizer's, or its name among several.
    chat_template_kwargs: what else the template gets, such as tools or enable_thinking.
    roles: the roles whose messages are scored.
    pseudo: for a masked model, the pseudo-perplexity; one of PSEUDO. Each token is scored where it
        alone is masked ("original"), or it and the later ones of its word ("within_word_l2r").

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range, named.
    """

    preset: str | None = None
    add_start_token: bool | int = True
    join_contexts: str = "text"
    max_length: int | None = None
    window: int | None = None
    stride: int | None = None
    start_each_window: bool | None = None
    positions: bool | Sequence[int] = False
    conversations: bool = False
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    roles: Sequence[str] = ("assistant",)
    pseudo: str | None = None
    dtype: str = "float32"
    backend: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.preset, str | None) or self.preset not in PRESETS:
            names = ", ".join(repr(name) for name in PRESETS)
            raise ValueError(f"preset must be one of {names}, got {self.preset!r}.")
        start = self.add_start_token
        if not isinstance(start, (int, np.integer)) or start < 0:
            raise TypeError(f"add_start_token must be True, False or a token id, got {start!r}.")
        if not isinstance(start, bool):
            object.__setattr__(self, "add_start_token", int(start))
        if self.join_contexts not in JOIN_CONTEXTS:
            raise ValueError(
                f"join_contexts must be one of {JOIN_CONTEXTS}, got {self.join_contexts!r}."
            )
        for name in ("max_length", "window", "stride"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, positive_int(value, name))
        if self.window is not None and self.stride is not None:
            check_window(self.window, self.stride)
        if not isinstance(self.start_each_window, bool | None):
            raise TypeError(
                f"start_each_window must be True, False or None, got {self.start_each_window!r}."
            )
        if not isinstance(self.positions, bool):
            object.__setattr__(self, "positions", _edges(self.positions))
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        check_backend(self.backend)
        if not self.rules.puts_start_token and start is not True:
            raise ValueError(f'add_start_token has no meaning with preset="{self.preset}".')
        for name in self.rules.without:
            if getattr(self, name) is not None:
                raise ValueError(f'{name} has no meaning with preset="{self.preset}".')
        self._check_conversations()
        if self.pseudo is not None:
            self._check_pseudo()

    def _check_conversations(self) -> None:
        if not isinstance(self.chat_template, str | None):
            raise TypeError(f"chat_template must be a string, got {self.chat_template!r}.")
        if not isinstance(self.chat_template_kwargs, Mapping | None):
            raise TypeError(
                "chat_template_kwargs must be a dict, such as {'enable_thinking': False}, got "
                f"{self.chat_template_kwargs!r}."
            )
        if self.chat_template_kwargs is not None:  # tools may come from a dataset, as messages do
            variables = {name: plain(value) for name, value in self.chat_template_kwargs.items()}
            object.__setattr__(self, "chat_template_kwargs", variables)
        roles = self.roles
        is_list = isinstance(roles, Sequence) and not isinstance(roles, str)
        if not is_list or not roles or not all(isinstance(role, str) for role in roles):
            raise TypeError(f"roles must be names of roles, such as ('assistant',), got {roles!r}.")
        object.__setattr__(self, "roles", tuple(roles))
        if self.conversations:  # the template decides what stands in front
            names = ("preset", "add_start_token", "max_length", "join_contexts")
            self.refuse(names, "with conversations")
        else:
            names = ("chat_template", "chat_template_kwargs", "roles")
            self.refuse(names, "with texts that are no conversations")

    def _check_pseudo(self) -> None:
        if self.pseudo not in PSEUDO:
            raise ValueError(f"pseudo must be one of {PSEUDO} or None, got {self.pseudo!r}.")
        names = ("preset", "add_start_token", "stride", "start_each_window", "positions")
        self.refuse((*names, "conversations"), f'with pseudo="{self.pseudo}"')

    def check_use(self, with_contexts: bool, with_groups: bool = False) -> None:
        """Raises ValueError if texts under this preset have no contexts, or no groups."""
        if with_contexts and not self.rules.takes_contexts:
            raise ValueError(f'preset="{self.preset}" has no contexts.')
        if with_groups and self.rules.joint is not None:
            raise ValueError(f'preset="{self.preset}" joins all texts, so it has no groups.')

    def refuse_pseudo(self, method: str) -> None:
        """Raises ValueError for the options of a masked model in a method that takes none."""
        if self.pseudo is not None:
            raise ValueError(f"{method} takes causal models only, so pseudo= does not go with it.")

    def refuse(self, names: Sequence[str], where: str) -> None:
        """Raises ValueError if one of these options does not have its default value."""
        for field in fields(self):
            value = getattr(self, field.name)
            is_default = type(value) is type(field.default) and value == field.default
            if field.name in names and not is_default:
                name = "A conversation" if field.name == "conversations" else field.name
                raise ValueError(f"{name} has no meaning {where}.")

    @property
    def rules(self) -> Preset:
        """The conventions of the preset."""
        return PRESETS[self.preset]


def _edges(positions) -> tuple[int, ...]:
    """The edges of buckets by position.

    Raises:
        TypeError, ValueError: not whole numbers, not ascending from 0.
    """
    if isinstance(positions, str) or not isinstance(positions, Iterable):
        raise TypeError(f"positions must be True, False or edges of buckets, got {positions!r}.")
    edges = tuple(positive_int(edge, f"positions[{i}]", 0) for i, edge in enumerate(positions))
    if edges[:1] != (0,) or sorted(set(edges)) != list(edges):
        raise ValueError(
            f"positions must be edges that ascend from 0, such as (0, 1, 256), got {edges}."
        )
    return edges
