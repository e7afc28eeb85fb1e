"""A pasted conversation -> its messages. No Gradio here.

It is JSON, or turns as they are typed:

    User: Name a color.
    Assistant: Blue.
"""

import json
import re
from typing import Any

ASSISTANT = "assistant"
# The first line of a turn; the lines behind it belong to the turn as well.
HEADER = re.compile(r"^(user|assistant|system):", re.IGNORECASE | re.MULTILINE)
# Each turn of the assistant is rendered with all before it: some templates take a second for these.
MOST_MESSAGES = 200
EXPECTED_JSON = 'a list of messages such as [{"role": "user", "content": "Hello"}, …]'
EXPECTED = f"Begin each turn with User:, Assistant: or System:, or paste {EXPECTED_JSON}."

Message = dict[str, str]


def read_conversation(pasted: str) -> list[Message]:
    """The messages of a conversation, each with a role and a content, one of them the assistant's.

    JSON is a list of messages, or an object that has one as its "messages". The roles are then any
    that the template of the model knows.

    Raises:
        ValueError: with a sentence for the person who pasted it.
    """
    pasted = pasted.strip()
    messages = _of_json(pasted) if pasted[:1] in ("[", "{") else _of_turns(pasted)
    if len(messages) > MOST_MESSAGES:
        raise ValueError(
            f"The conversation has {len(messages):,} messages; here at most {MOST_MESSAGES} can be "
            "scored. Use the module for more."
        )
    if not any(m["role"] == ASSISTANT and m["content"].strip() for m in messages):
        raise ValueError(
            "The assistant says nothing in this conversation, so there is nothing to score. A line "
            'that begins with Assistant:, or a message with "role": "assistant", is its turn.'
        )
    return messages


def _of_turns(pasted: str) -> list[Message]:
    """The messages of typed turns, without the white space around each."""
    before, *parts = HEADER.split(pasted)
    if before:
        line = before.strip().partition("\n")[0]
        raise ValueError(f"The first line, {line[:40]!r}, begins no turn. {EXPECTED}")
    return [
        {"role": role.lower(), "content": content.strip()}
        for role, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _of_json(pasted: str) -> list[Message]:
    try:
        found = json.loads(pasted)
    except RecursionError:
        raise ValueError(f"The JSON is nested too deeply. Expected is {EXPECTED_JSON}.") from None
    except ValueError as error:
        raise ValueError(f"This is no JSON: {error}. Expected is {EXPECTED_JSON}.") from None
    messages = found.get("messages") if isinstance(found, dict) else found
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f"The JSON holds no messages. Expected is {EXPECTED_JSON}, or an object with such a "
            'list as its "messages".'
        )
    for number, message in enumerate(messages, 1):
        _check(message, f"Message {number}")
    return messages


def _check(message: Any, name: str) -> None:
    if not isinstance(message, dict):
        raise ValueError(f"{name} is no object. Expected is {EXPECTED_JSON}.")
    for key in message:
        # Such as the call of a tool, which a template may show.
        if key not in ("role", "content"):
            raise ValueError(
                f'{name} has the key {key[:40]!r}. Here a message has a "role" and a "content" '
                "only; use the module for more."
            )
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise ValueError(
                f'{name} must have a text as its "{key}". Expected is {EXPECTED_JSON}.'
            )
        try:
            message[key].encode()
        except UnicodeEncodeError:
            raise ValueError(
                f'{name} holds half a character (a lone surrogate) in its "{key}".'
            ) from None
