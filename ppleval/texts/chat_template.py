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

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ppleval.shown import shown, shown_message

Messages = Sequence[Mapping[str, Any]]

# What marks the words of the assistant in a template.
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
USER, ASSISTANT = "user", "assistant"
# Where a template asks whether a content is None, as those of DeepSeek V3 and R1 do.
ASKS_FOR_NONE = re.compile(r"\bcontent['\"]?\]?\s*(is\s+(not\s+)?|[!=]=\s*)none\b", re.IGNORECASE)
# Takes the place of a content, to see where a template puts it.
CONTENT = "thecontentofthisturn"
# A tag, and what is not its name: <think> and </think>, <|channel> and <channel|>,
# <|START_THINKING|> and <|END_THINKING|>.
TAG = re.compile(r"<[^<>]+>")
NO_NAME = re.compile(r"start|end|[^a-z]")
JOIN_PARTS = (
    "The content is a list of parts, and this template may take strings only; then join the parts: "
    'message["content"] = "".join(part["text"] for part in message["content"]).'
)
# A template is a program, which may print without end. What a model can read is far shorter.
MOST_CHARACTERS = 2**27
# What transformers gives to a template, or takes for its own.
RESERVED = ("messages", "conversations", "chat_template", "add_generation_prompt")
RESERVED += ("continue_final_message", "return_assistant_tokens_mask")


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
        for name in RESERVED:
            if name in variables:
                raise ValueError(
                    f"chat_template_kwargs must not have {name!r}, which is set for each turn."
                )
        self.source = tokenizer.get_chat_template(source, variables.get("tools"))
        self.roles = tuple(sorted(set(roles)))
        self._variables = {**tokenizer.special_tokens_map, **variables}
        self._is_marked = GENERATION.search(self.source) is not None
        self._asks_for_none = ASKS_FOR_NONE.search(self.source) is not None
        added = tokenizer.added_tokens_decoder.items()
        special = {token_id: str(token) for token_id, token in added if token.special}
        # The ids that stand for no text, such as that of the end of a turn.
        self.special_ids = frozenset(special)
        specials = {*special.values(), *tokenizer.all_special_tokens}
        self._specials = tuple(sorted(filter(None, specials), key=len, reverse=True))

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> Rendering:
        """The messages as text, and what the template marks as the assistant's in it.

        Raises:
            ValueError: the template refuses them, or makes no text of them.
        """
        # A call of a tool has no content. Many templates print None where a missing key is right.
        given = [dict(message) for message in messages]
        if self._asks_for_none:
            given = [{**message, "content": message.get("content")} for message in given]
        try:
            # It says that it returns a string.
            found: Any = render_jinja_template(
                conversations=[given],
                chat_template=self.source,
                return_assistant_tokens_mask=self._is_marked,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
            (text,), marks = found
            if len(text) > MOST_CHARACTERS:
                raise ValueError(f"it makes {len(text):,} characters of them")
            text.encode()
        except Exception as error:  # a template is a program, which may fail in any way
            hint = f". {JOIN_PARTS}" if _contents_in_parts(given) else ""
            raise ValueError(
                f"The chat template refuses {_named(messages)}: {shown_message(error)}{hint}"
            ) from error
        if any(str(content) in text for content in _contents_in_parts(given)):
            raise ValueError(
                f"The chat template prints the content of {_named(messages)} as a list. "
                f"{JOIN_PARTS}"
            )
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
        seen, at = self._seen_before(messages, whole.text)
        text, moved = seen + whole.text[at:], len(seen) - at
        end = self._end_of_turn(messages, whole.text, at)
        if not self._is_marked or self.roles != (ASSISTANT,):
            return Rendering(text, [(at + moved, end + moved)])
        marks = [(first, stop) for first, stop in whole.scored if stop >= at]
        if not marks:
            raise ValueError(
                f"The chat template marks nothing that the assistant says in {_named(messages)}. "
                "Its {% generation %} must enclose the content."
            )
        # Without what the prompt holds of the turn, and what follows its end-of-turn token.
        clipped = [(max(first, at) + moved, min(stop, end) + moved) for first, stop in marks]
        scored = [(first, stop) for first, stop in clipped if first < stop]
        return Rendering(text, scored or [(at + moved, at + moved)])

    def _seen_before(self, messages: Messages, whole: str) -> tuple[str, int]:
        """What the model sees before the last turn, and where that turn begins in `whole`.

        It sees the prompt for the turn. `whole` begins with it, or has at least the header of the
        turn: Mistral's template, for one, shows the system message in a prompt, but not in a
        conversation that ends with the assistant. Where nothing asks for a turn, it begins with its
        content, and with the blanks in front of that if there is no header.

        Raises:
            ValueError: it is not known what the model saw.
        """
        *before, turn = messages
        is_assistant = turn["role"] == ASSISTANT
        plain = self.render(before).text if before else ""
        prompt, header = plain, ""
        if is_assistant and before:
            prompt = self.render(before, add_generation_prompt=True).text
            header = prompt[_num_same(plain, prompt) :]
            if header and whole.startswith(prompt):
                return prompt, len(prompt)
        stand_in = {"role": turn["role"], "content": CONTENT}
        shown = self.render([*before, stand_in]).text
        content = shown.rfind(CONTENT)
        if is_assistant and not before:
            # Templates need a message in front. What they put behind one is the header.
            prompted = self.render([stand_in], add_generation_prompt=True).text
            header = prompted[_num_same(shown, prompted) :]
        is_prefix = whole.startswith(plain) and shown.startswith(plain)
        if not header and (is_prefix or not is_assistant):
            blank = is_prefix and not shown[len(plain) : content].strip()
            begin = len(plain) if blank else content
            if content >= 0 and whole.startswith(shown[:begin]):
                return whole[:begin], begin
        else:
            at, left_out = self._behind_header(header or self._last_piece(plain), shown, content)
            if at > 0 and whole.startswith(shown[:at]):
                return prompt if before else whole[:at] + left_out, at
        raise ValueError(
            f"It is not known what the model saw before {_turn_named(turn)}. The chat template "
            f"asks for it by {(prompt or header)[-40:]!r}, and does not show that in front of it. "
            "Pass chat_template= or chat_template_kwargs= that render both alike, such as "
            "{'enable_thinking': False}."
        )

    def _behind_header(self, header: str, shown: str, content: int) -> tuple[int, str]:
        """Where a header ends in front of the content, and what is left out of it; (-1, "") if it
        is not there.

        Left out may be empty reasoning at its end, as by Gemma 4 and QwQ; DeepSeek V3 keeps the
        closing tag of it.
        """
        tags = [tag.start() for tag in TAG.finditer(header)]
        for size in sorted({*tags, len(header)} - {0}, reverse=True):
            found, left_out = shown.rfind(header[:size], 0, max(content, 0)), header[size:]
            if found < 0 or (left_out and not _is_empty_element(left_out)):
                continue
            between = shown[found + size : content]
            closing = left_out[left_out.rfind("<") :].strip() if left_out else ""
            if not between.strip().removeprefix(closing):
                kept = between.find(closing) + len(closing) if closing in between else 0
                return found + size + kept, left_out
        return -1, ""

    def _last_piece(self, text: str) -> str:
        """A text from its last special token on, or else its last line."""
        starts = [text.rfind(special) for special in self._specials]
        begin = max(starts, default=-1)
        return text[begin if begin >= 0 else text.rstrip().rfind("\n") + 1 :]

    def _end_of_turn(self, messages: Messages, whole: str, start: int) -> int:
        """Behind the end-of-turn token of the last turn, which begins at `start`."""
        ends = self._ends_of_specials(whole, start)
        if len(ends) < 2:
            return ends[0] if ends else len(whole)
        # Of several, those that stay when another message follows: Phi 3 ends all with one more.
        # With a content, or harmony's header would be taken for the end: it stays, too.
        filled = [*messages[:-1], {**messages[-1], "content": CONTENT}]
        role = ASSISTANT if messages[-1]["role"] == USER else USER
        with contextlib.suppress(ValueError):  # the template may refuse it
            shown = self.render(filled).text
            longer = self.render([*filled, {"role": role, "content": CONTENT}]).text
            same = _num_same(shown, longer)
            stays = [end <= same for end in self._ends_of_specials(shown, start)]
            if any(stays):
                ends = ends[: -stays.count(False) or None] or ends
        return ends[-1]

    def _ends_of_specials(self, text: str, start: int) -> list[int]:
        """Where special tokens end behind which nothing but such and white space follows."""
        ends: list[int] = []
        at = len(text)
        while at > start:
            if text[at - 1].isspace():
                at -= 1
            elif text.endswith(self._specials, start, at):
                ends.append(at)
                at -= next(len(s) for s in self._specials if text.endswith(s, start, at))
            else:
                break
        return ends[::-1]


def _contents_in_parts(messages: Messages) -> list[list]:
    """The contents that are lists, such as of one part {"type": "text", "text": "Hi"}."""
    contents = [message.get("content") for message in messages]
    return [content for content in contents if isinstance(content, list) and content]


def content_of(message: Mapping[str, Any]) -> str:
    """The text of a message; empty without one, as in a call of a tool."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _is_empty_element(text: str) -> bool:
    """Whether this is an opening tag and its closing one, such as <think></think>."""
    tags = TAG.findall(text)
    names = {NO_NAME.sub("", tag.lower()) for tag in tags}
    return len(tags) == len(set(tags)) == 2 and len(names) == 1


def _num_same(text: str, other: str) -> int:
    """How many characters two texts have in common at their start."""
    if other.startswith(text):
        return len(text)
    pairs = zip(text, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _named(messages: Messages) -> str:
    """A conversation, for errors."""
    return f"the conversation that begins {content_of(messages[0])[:40]!r}"


def _turn_named(turn: Mapping[str, Any]) -> str:
    """A message, for errors."""
    return f"the {shown(turn['role'])}'s turn {content_of(turn)[:40]!r}"
