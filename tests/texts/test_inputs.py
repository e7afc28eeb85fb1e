"""None below the top level of a message: one number, whichever way the conversations come in."""

import json
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from text_oracles import TINY
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppleval.cli.main import main

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role + '\\n' }}"
    "{% if m.content is defined %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls %}"
    "{{ '<call>' + c.function.name + ' ' + (c.function.arguments | tojson) + '</call>' }}"
    "{% endfor %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"
)
ROLES = ("user", "assistant")
OPTIONS = {"model_id": TINY, "chat_template": TEMPLATE}
# Whole numbers that are there or not, None in lists, structs that are there or not; their keys in
# the order that Arrow gives to all of them.
ARGUMENTS = [
    {"city": "Bern", "days": [1, None], "near": {"km": 5}},
    {"days": [None], "query": "list", "limit": 3},
    {"near": {"of": "Thun"}, "query": "a"},
    {},
]


def called(arguments: dict, **message) -> list[dict]:
    call = {"type": "function", "function": {"name": "find", "arguments": arguments}}
    return [
        {"role": "user", "content": "Find."},
        {"role": "assistant", "tool_calls": [call]} | message,
        {"role": "tool", "content": "none"},
        {"role": "assistant", "content": "Found."},
    ]


TALKS = [called(arguments) for arguments in ARGUMENTS]
# One that calls twice, which in pandas is an array whose truth is not known.
TALKS[0][1]["tool_calls"] = TALKS[0][1]["tool_calls"] * 2
NAMES = ("city", "days", "near", "query", "limit")


def nll_by_hand() -> torch.Tensor:
    """Oracle: nll of each token of what the assistant says, from text rendered without a None."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = AutoModelForCausalLM.from_pretrained(TINY).eval()
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    found = []
    for number, arguments in enumerate(ARGUMENTS):
        call = f"<call>find {json.dumps(arguments)}</call>" * (2 if number == 0 else 1)
        asked = f"{bos}user\nFind.{eos}assistant\n"
        pieces = [asked, call + eos, f"tool\nnone{eos}assistant\n", f"Found.{eos}"]
        ends = np.cumsum([len(piece) for piece in pieces])
        encoded = tokenizer("".join(pieces), add_special_tokens=False, return_offsets_mapping=True)
        ids = torch.tensor(encoded.input_ids)
        starts = [start for start, _ in encoded.offset_mapping]
        said = np.searchsorted(ends, starts, side="right") % 2 == 1
        with torch.no_grad():
            scores = model(ids[None]).logits[0].double().log_softmax(-1)
        nll = -scores[torch.arange(len(ids) - 1), ids[1:]]
        found.append(nll[torch.tensor(said[1:])])
    return torch.cat(found)


@pytest.fixture(scope="module")
def expected():
    nll = nll_by_hand()
    return {"perplexity": nll.mean().exp().item(), "num_tokens": len(nll)}


def check(found: dict, expected: dict) -> None:
    assert found["num_tokens"] == expected["num_tokens"]
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)


def rows(talks) -> list[dict]:
    return [{"messages": talk} for talk in talks]


def table() -> pa.Table:
    made = pa.Table.from_pylist(rows(TALKS))
    _, call, *_ = made["messages"][3].as_py()
    assert call["content"] is None
    assert call["tool_calls"][0]["function"]["arguments"] == dict.fromkeys(NAMES)
    return made


def frame(**options) -> pd.DataFrame:
    out = pa.BufferOutputStream()
    parquet.write_table(table(), out)
    return pd.read_parquet(pa.BufferReader(out.getvalue()), **options)


WAYS = {
    "list": lambda: TALKS,
    "list with None": lambda: table()["messages"].to_pylist(),
    "column": lambda: datasets.Dataset(table())["messages"],
    "generator": lambda: (row["messages"] for row in datasets.Dataset(table())),
    "pandas": lambda: pd.DataFrame(rows(TALKS))["messages"],
    "pandas of Arrow": lambda: frame(dtype_backend="pyarrow")["messages"],
}


@pytest.mark.parametrize("way", WAYS)
def test_conversations_as_texts(ppl, expected, way):
    check(ppl.compute(predictions=WAYS[way](), **OPTIONS), expected)


def written(kind: str, directory: Path) -> Path:
    path = directory / f"talks.{kind}"
    if kind == "parquet":
        parquet.write_table(table(), path)
    elif kind == "json":
        path.write_text(json.dumps(rows(TALKS)))
    else:
        path.write_text("\n".join(map(json.dumps, rows(TALKS))))
    return path


@pytest.mark.parametrize("way", ["jsonl", "json", "parquet", "--dataset parquet"])
def test_conversations_as_files(expected, tmp_path, capsys, way):
    *option, kind = way.split()
    (tmp_path / "template").write_text(TEMPLATE)
    command = ["compute", "--model", TINY, "--json", "--column", "messages"]
    command += ["--chat-template", str(tmp_path / "template"), *option]
    assert main([*command, str(written(kind, tmp_path))]) == 0
    check(json.loads(capsys.readouterr().out), expected)


def test_pandas_makes_floats_of_whole_numbers(ppl, expected):
    """Where another row has none: 3.0 for 3, which nothing tells from a 3.0 that was there."""
    column = frame()["messages"]
    with pytest.warns(UserWarning, match=r'predictions\[0\] .* 1.0, .*dtype_backend="pyarrow"'):
        found = ppl.compute(predictions=column, **OPTIONS)
    assert found["num_tokens"] != expected["num_tokens"]


def test_a_part_of_content_that_is_padded(ppl):
    """As in a dataset in which other messages have images."""
    template = TEMPLATE.replace("{{ m.content }}", "{{ m.content | tojson }}")
    talk = [{"role": role, "content": [{"type": "text", "text": "Hi"}]} for role in ROLES]
    padded = [
        {**message, "content": [{**message["content"][0], "image": None}]} for message in talk
    ]
    options = OPTIONS | {"chat_template": template}
    found, expected = (
        ppl.compute(predictions=[given], **options)["perplexity"] for given in (padded, talk)
    )
    assert found == expected


def test_tools_from_a_dataset(ppl):
    """They are padded as messages are, and have one signature; None in a list is data."""
    kinds = [{"type": "integer", "enum": [1, None]}, {"type": "string", "default": "a"}]
    tools = [{"name": "find", "parameters": {"properties": {"x": kind}}} for kind in kinds]
    padded = datasets.Dataset.from_list([{"tools": tools}])[0]["tools"]
    assert padded != tools
    template = "{{ tools | tojson }}" + TEMPLATE
    options = OPTIONS | {"chat_template": template}
    found, expected = (
        ppl.compute(predictions=TALKS, **options, chat_template_kwargs={"tools": given})
        for given in (padded, tools)
    )
    assert found == expected
    scorer = ppl.text_scorer(
        **options, conversations=True, chat_template_kwargs={"tools": padded, "x": None}
    )
    assert scorer.options.chat_template_kwargs == {"tools": tools, "x": None}


# As DeepSeek V3 and R1 tell calls from words.
ASKS = (
    "{{ bos_token }}{% for m in messages %}{{ m.role + '\n' }}"
    "{% if IS_NONE %}{{ m.tool_calls[0].function.name }}{% else %}{{ m['content'] }}{% endif %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    "is_none",
    [
        "m['content'] is none",
        "m.content == None",
        "not m.content is not none",
        'not m["content"]!=none',
    ],
)
def test_a_template_that_asks_whether_content_is_none(ppl, is_none):
    """It gets None, also for a message without a key of that name."""
    options = {"model_id": TINY, "chat_template": ASKS.replace("IS_NONE", is_none)}
    for talks in (TALKS, table()["messages"].to_pylist()):
        score = ppl.score(talks, **options)[0]
        said = [token for token, nll in zip(score.tokens, score.nll, strict=True) if nll == nll]
        assert "".join(said) == "find<|eos|>Found.<|eos|>"
