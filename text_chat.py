"""A conversation -> the text that a model reads, and which part of it the model says.

A turn runs from behind the prompt that asks for it, with the header of the turn, to its end-of-turn
token. The prompt is the template's, rendered from the messages before the turn.
"""

import contextlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

Messages = Sequence[Mapping[str, Any]]

# What marks the words of the assistant in a template.
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
ASSISTANT = "assistant"
# A tag, and what is not its name: <think> and </think>, <|channel> and <channel|>,
# <|START_THINKING|> and <|END_THINKING|>.
TAG = re.compile(r"<[^<>]+>")
NO_NAME = re.compile(r"start|end|[^a-z]")


@dataclass(frozen=True)
class Rendering:
    """The text of some turns, and the characters [start, end) of it that are scored."""

    text: str
    scored: list[tuple[int, int]]

    def continues(self, other: "Rendering") -> bool:
        """Whether this text begins with the other up to the end of its last turn."""
        return self.text.startswith(other.text[: other.scored[-1][1]])


class ChatTemplate:
    """Renders conversations.

    Args:
        tokenizer: whose template, and whose special tokens.
        source: the template in place of the tokenizer's, or its name among several; None for its
            own.
        variables: what else the template gets, such as tools.
        roles: whose messages are scored.

    Raises:
        ValueError: there is no such template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source: str | None,
        variables: Mapping[str, Any],
        roles: Sequence[str],
    ):
        if source is None and tokenizer.chat_template is None:
            raise ValueError(
                "Conversations need a chat template, and this tokenizer has none. Pass "
                "chat_template=, or texts instead of messages."
            )
        self.source = tokenizer.get_chat_template(source, variables.get("tools"))
        self.roles = tuple(roles)
        self._variables = {**tokenizer.special_tokens_map, **variables}
        self._is_marked = GENERATION.search(self.source) is not None
        self._has_prompt = "add_generation_prompt" in self.source
        specials = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        specials |= set(tokenizer.all_special_tokens)
        longest_first = sorted(filter(None, specials), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        # The template may add more behind the end-of-turn token: white space, or the end of all.
        self._end = re.compile(rf"({self._special.pattern})(?:\s|{self._special.pattern})*\Z")

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> Rendering:
        """The messages as text, and what the template marks as the assistant's in it.

        Raises:
            ValueError: the template refuses them.
        """
        # Many templates fail at None, or print it, where a missing key is right.
        given = [{k: v for k, v in message.items() if v is not None} for message in messages]
        try:
            # It says that it returns a string.
            found: Any = render_jinja_template(
                conversations=[given],
                chat_template=self.source,
                return_assistant_tokens_mask=self._is_marked,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(f"The chat template refuses {_named(messages)}: {error}") from error
        (text,), marks = found
        return Rendering(text, marks[0] if marks else [])

    def renderings(self, messages: Messages) -> list[Rendering]:
        """The conversation, in one text if each turn is rendered alike when others follow.

        A template may change earlier turns, as Qwen 3 drops their reasoning. A turn is then scored
        in a text of its own, as the model saw it when it spoke.

        Raises:
            ValueError: no message has one of the roles, the template refuses the conversation, or
                does not show where a turn begins.
        """
        found: list[Rendering] = []
        for i, message in enumerate(messages):
            if message["role"] not in self.roles:
                continue
            turn = self._turn(messages[: i + 1])
            if found and turn.continues(found[-1]):
                turn = Rendering(turn.text, found.pop().scored + turn.scored)
            found.append(turn)
        if not found:
            raise ValueError(
                f"There is nothing to score in {_named(messages)}: it has no message of the role "
                f"{' or '.join(self.roles)}."
            )
        if messages[-1]["role"] not in self.roles:
            whole = self.render(messages)
            if whole.continues(found[-1]):
                found[-1] = Rendering(whole.text, found[-1].scored)
        return found

    def _turn(self, messages: Messages) -> Rendering:
        """The last message, behind what the model sees of those before it."""
        whole = self.render(messages)
        if self._is_marked and self.roles == (ASSISTANT,):
            return self._marked_turn(messages, whole)
        if messages[-1]["role"] == ASSISTANT:
            text, start = self._behind_prompt(messages, whole.text)
        else:  # no prompt asks for it
            text, start = whole.text, self._start_of_content(messages[-1], whole.text)
        return Rendering(text, [(start, self._end_of_turn(text, start))])

    def _marked_turn(self, messages: Messages, whole: Rendering) -> Rendering:
        """The last message as the template marks it, without what the prompt holds of it, and
        without what follows its end-of-turn token."""
        num_before = len(self.render(messages[:-1]).scored) if len(messages) > 1 else 0
        marks = whole.scored[num_before:]
        if not marks:
            raise ValueError(
                f"The chat template marks nothing that the assistant says in {_named(messages)}. "
                "Its {% generation %} must enclose the content."
            )
        text, start = whole.text, marks[0][0]
        with contextlib.suppress(ValueError):  # then the marks alone tell
            text, start = self._behind_prompt(messages, text)
        end = self._end_of_turn(text, start)
        moved = len(text) - len(whole.text)
        clipped = [(max(first + moved, start), min(stop + moved, end)) for first, stop in marks]
        return Rendering(text, [(first, stop) for first, stop in clipped if first < stop])

    def _behind_prompt(self, messages: Messages, whole: str) -> tuple[str, int]:
        """The text in which the last turn is scored, and where it begins.

        That is `whole`, if it begins with the prompt for the turn. Else it is the prompt and what
        follows the header of the turn in `whole`: Mistral's template, for one, shows the system
        message in a prompt, but not in a conversation that ends with the assistant.
        """
        *before, turn = messages
        prompt = self._prompt(before, turn)
        text, start = whole, len(prompt)
        if not whole.startswith(prompt):
            at = self._behind_header(self._header(before, prompt), turn, whole)
            if at is None:
                raise ValueError(
                    f"The chat template asks for {_turn_named(turn)} by {prompt[-40:]!r}, which is "
                    "not in front of it in the conversation, so it is not known what the model "
                    "saw. Pass chat_template= or chat_template_kwargs= that render both alike, "
                    "such as {'enable_thinking': False}."
                )
            text = prompt + whole[at:]
        if not self._has_prompt:  # then the header, if there is one, is not in the prompt
            content_start = self._start_of_content(turn, text)
            if text[start:content_start].strip():
                start = content_start
        return text, start

    def _behind_header(self, header: str, turn: Mapping[str, Any], whole: str) -> int | None:
        """Where the last turn begins in `whole`; None if its header is not there.

        The header may end with empty reasoning, which Gemma 4 and QwQ leave out of a turn, and of
        which DeepSeek V3 keeps the closing tag.
        """
        content = content_of(turn).strip()
        end = whole.rfind(content) if content else len(whole)
        tags = [tag.start() for tag in TAG.finditer(header)]
        for size in sorted({*tags, len(header)} - {0}, reverse=True):
            at = whole.rfind(header[:size], 0, max(end, 0))
            if at >= 0:
                at, left_out = at + size, header[size:]
                if left_out and not _is_empty_element(left_out):
                    return None
                closing = left_out[left_out.rfind("<") :].strip() if left_out else ""
                return at + len(closing) if whole.startswith(closing, at) else at
        return None

    def _start_of_content(self, turn: Mapping[str, Any], text: str) -> int:
        """Where the content of the last message begins in a text."""
        start = text.rfind(content_of(turn).strip())
        if start < 0:
            raise ValueError(
                f"The chat template changes the content of {_turn_named(turn)}, so it is not known "
                "where it begins."
            )
        return start

    def _prompt(self, before: Messages, turn: Mapping[str, Any]) -> str:
        """What the model is asked with for a turn."""
        if before:
            return self.render(before, add_generation_prompt=True).text
        # Templates need a message in front. What they put behind one is the header.
        alone = self.render([turn]).text
        prompted = self.render([turn], add_generation_prompt=True).text
        pairs = zip(alone, prompted, strict=False)
        num_same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        header = prompted[num_same:]
        return alone[: alone.find(header) + len(header)]

    def _header(self, before: Messages, prompt: str) -> str:
        """What asks for the turn at the end of the prompt, or else its last special token or line
        and all behind it."""
        alone = self.render(before).text if before else ""
        if self._has_prompt and prompt.startswith(alone):
            return prompt[len(alone) :]
        starts = [match.start() for match in self._special.finditer(prompt)]
        return prompt[starts[-1] if starts else prompt.rstrip().rfind("\n") + 1 :]

    def _end_of_turn(self, text: str, start: int) -> int:
        """Behind the end-of-turn token of the last turn, which begins at `start`."""
        end = self._end.search(text, start)
        return len(text) if end is None else end.end(1)


def content_of(message: Mapping[str, Any]) -> str:
    """The text of a message; empty without one, as in a call of a tool."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _is_empty_element(text: str) -> bool:
    """Whether this is an opening tag and its closing one, such as <think></think>."""
    tags = TAG.findall(text)
    names = {NO_NAME.sub("", tag.lower()) for tag in tags}
    return len(tags) == len(set(tags)) == 2 and len(names) == 1


def _named(messages: Messages) -> str:
    """A conversation, for errors."""
    return f"the conversation that begins {content_of(messages[0])[:40]!r}"


def _turn_named(turn: Mapping[str, Any]) -> str:
    """A message, for errors."""
    return f"the {turn['role']}'s turn {content_of(turn)[:40]!r}"
