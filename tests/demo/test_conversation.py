"""A pasted conversation becomes messages, or a sentence says what is expected."""

import json
import re

import pytest

from demo.conversation import MOST_MESSAGES, read_conversation

USER = {"role": "user", "content": "Name a color."}
ASSISTANT = {"role": "assistant", "content": "Blue.\n\nOr red: both are."}


@pytest.mark.parametrize(
    "pasted",
    [
        json.dumps([USER, ASSISTANT]),
        f" \n{json.dumps([USER, ASSISTANT], indent=2)}\n",
        json.dumps({"model": "any", "messages": [USER, ASSISTANT]}),
        "User: Name a color.\nAssistant: Blue.\n\nOr red: both are.",
        "user:Name a color.\n\nASSISTANT:\nBlue.\n\nOr red: both are.\n\n",
        "\n  uSeR:  Name a color. \r\nAssistant: Blue.\n\nOr red: both are.",
    ],
)
def test_a_conversation(pasted):
    assert read_conversation(pasted) == [USER, ASSISTANT]


def test_turns_of_one_role_stay_apart():
    pasted = "System: Be short.\nSystem:\nAssistant: Yes.\nAssistant: No."
    found = [(message["role"], message["content"]) for message in read_conversation(pasted)]
    assert found == [
        ("system", "Be short."), ("system", ""), ("assistant", "Yes."), ("assistant", "No."),
    ]  # fmt: skip


def test_only_a_line_begins_a_turn():
    pasted = "User: What does User: mean?\n  Assistant: this is indented.\nAssistant: A name."
    assert read_conversation(pasted) == [
        {"role": "user", "content": "What does User: mean?\n  Assistant: this is indented."},
        {"role": "assistant", "content": "A name."},
    ]


def test_json_keeps_white_space_and_any_role():
    messages = [{"role": "developer", "content": " a\n"}, {"role": "assistant", "content": "b \n"}]
    assert read_conversation(json.dumps(messages)) == messages


JSON = 'Expected is a list of messages such as [{"role": "user", "content": "Hello"}, …]'
TYPED = "Begin each turn with User:, Assistant: or System:, or paste a list of messages such as ["


@pytest.mark.parametrize(
    ("pasted", "start", "end"),
    [
        ("Hello!\nUser: Hi.\nAssistant: Ho.", "The first line, 'Hello!', begins no turn", TYPED),
        ("Human: Hi.\nAssistant: Ho.", "The first line, 'Human: Hi.', begins no turn", TYPED),
        ("User: Hi.", "The assistant says nothing in this conv", '"role": "assistant", is its'),
        ("User: Hi.\nAssistant:\n", "The assistant says nothing in this", '"role": "assistant"'),
        (json.dumps([USER]), "The assistant says nothing in this conv", "Assistant:, or a message"),
        (
            json.dumps([{"role": "gpt", "content": "Hi."}]),
            "The assistant says nothing in this conversation",
            '"role": "assistant", is its turn',
        ),
        ("[1, 2", "This is no JSON: Expecting ',' delimiter: line 1 column 6", JSON),
        ("{role: 1}", "This is no JSON: Expecting property name", JSON),
        ("[" + "1" * 5000 + "]", "This is no JSON: Exceeds the limit (4300 digits)", JSON),
        ("[" * 20_000, "The JSON is nested too deeply", JSON),
        ('{"a":' * 4000, "The JSON is nested too deeply", JSON),
        ("{}", "The JSON holds no messages", 'an object with such a list as its "messages"'),
        ("[]", "The JSON holds no messages", JSON),
        ('{"messages": {"role": "user"}}', "The JSON holds no messages", JSON),
        ('{"messages": null}', "The JSON holds no messages", JSON),
        ('["Hi."]', "Message 1 is no object", JSON),
        (json.dumps([USER, [ASSISTANT]]), "Message 2 is no object", JSON),
        (json.dumps([USER, {"role": "assistant"}]), 'Message 2 must have a text as its "co', JSON),
        (json.dumps([{"content": "Hi."}]), 'Message 1 must have a text as its "role"', JSON),
        (json.dumps([{"role": 1, "content": "Hi."}]), 'Message 1 must have a text as its "r', JSON),
        (json.dumps([{"role": "user", "content": None}]), "Message 1 must have a text", JSON),
        (
            json.dumps([{**ASSISTANT, "tool_calls": []}]),
            "Message 1 has the key 'tool_calls'",
            'has a "role" and a "content" only; use the module',
        ),
        (
            json.dumps([{"role": "user", "content": "\ud800"}]),
            "Message 1 holds half a character (a lone surrogate)",
            'in its "content"',
        ),
        (
            json.dumps([USER, {"role": "\udfff", "content": ""}]),
            "Message 2 holds half a character (a lone surrogate)",
            'in its "role"',
        ),
        (
            "Assistant: Hi.\n" * (MOST_MESSAGES + 1),
            "The conversation has 201 messages; here at most 200",
            "Use the module for more.",
        ),
    ],
)  # fmt: skip
def test_what_is_no_conversation(pasted, start, end):
    with pytest.raises(ValueError, match=f"^{re.escape(start)}.*{re.escape(end)}") as error:
        read_conversation(pasted)
    message = str(error.value)
    assert len(message) < 400  # app.MESSAGE_CHARACTERS


def test_as_many_messages_as_are_allowed():
    assert len(read_conversation("Assistant: Hi.\n" * MOST_MESSAGES)) == MOST_MESSAGES
