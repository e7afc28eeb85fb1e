"""Conversations: which tokens are scored, under templates as they are published; by hand, and
against a loop that asks the template itself for the words of each turn."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from support import ROOT
from text_oracles import TINY, config_of, grown
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ppleval.texts import chat_template

TEMPLATES = ROOT / "tests" / "chat_templates"
NAMES = ["chatml", "llama3", "gemma3", "qwen3", "mistral"]
SPECIAL = {
    "chatml": ["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
    "gemma3": ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
    "qwen3": [None, "<|im_end|>", "<|im_start|>"],
    "mistral": ["<s>", "</s>", "[INST]", "[/INST]"],
    "phi3": ["<s>", "<|im_end|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"],
    "harmony": [None, "<|return|>", "<|end|>", "<|start|>", "<|channel|>", "<|message|>"],
}
END = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma3": "<end_of_turn>"}
END |= {"qwen3": "<|im_end|>", "mistral": "</s>", "phi3": "<|end|>"}
# Where a template says what the assistant says: what is replaced by the same in marks.
MARKED = {
    "chatml": {
        "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}": (
            "message['role'] + '\n'}}{% if message['role'] == 'assistant' %}{% generation %}"
            "{{message['content'] + '<|im_end|>'}}{% endgeneration %}"
            "{% else %}{{message['content'] + '<|im_end|>'}}{% endif %}{{'\n'}}"
        )
    },
    "llama3": {
        "{{ content }}": (
            "{% if message['role'] == 'assistant' %}"
            "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% generation %}"
            "{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
            "{% else %}{{ content }}{% endif %}"
        )
    },
    "mistral": {
        '{{- " " + message["content"]|trim + eos_token}}': (
            '{% generation %}{{- " " + message["content"]|trim + eos_token}}{% endgeneration %}'
        )
    },
    # With the line end behind the end-of-turn token, which is not scored all the same.
    "qwen3": {
        "message.role + '\\n<think>": "message.role + '\\n' }}{% generation %}{{- '<think>",
        "content.lstrip('\\n') }}": "content.lstrip('\\n') }}{% endgeneration %}",
        "'\\n' + content }}": "'\\n' }}{% generation %}{{- content }}{% endgeneration %}",
        "{{- '<|im_end|>\\n' }}\n    {%- elif": (
            "{% generation %}{{- '<|im_end|>\\n' }}{% endgeneration %}\n    {%- elif"
        ),
    },
}


def conversation(*contents, system=None):
    """User and assistant in turn."""
    first = [] if system is None else [{"role": "system", "content": system}]
    turns = zip(["user", "assistant"] * len(contents), contents, strict=False)
    return first + [{"role": role, "content": content} for role, content in turns]


TALKS = [
    conversation("What is a list?", "A list holds items."),
    conversation("Hello!", "Hi there, naïve 🎉", "And then?", "The end."),
    conversation("One", " two", "three", "four\n\nfive", "six", "seven", "eight"),
]


def template_of(name):
    return (TEMPLATES / f"{name}.jinja").read_text()


def marked_template(name):
    source = template_of(name)
    for plain, marked in MARKED[name].items():
        assert plain in source, plain
        source = source.replace(plain, marked)
    return source


@pytest.fixture(scope="module")
def chats():
    """Name -> (tiny model, its tokenizer with the template of that name)."""
    return {name: make_chat(name) for name in SPECIAL}


def make_chat(name):
    bos, eos, *others = SPECIAL[name]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[token for token in [bos, eos, *others] if token],
    )
    trained.train_from_iterator(["What is a list? The user and the assistant. system"], trainer)
    trained.add_tokens(["<think>", "</think>"])  # as Qwen 3 has them: not special
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained,
        bos_token=bos,
        eos_token=eos,
        additional_special_tokens=others,
        chat_template=template_of(name),
    )
    torch.manual_seed(0)
    config = config_of("llama", len(tokenizer))
    config.max_position_embeddings = 256
    return grown(transformers.LlamaForCausalLM(config)), tokenizer


def loop(model, tokenizer, messages):
    """[(ids of the prompt, ids that the assistant says, their nll)] of each turn, one at a time.

    The prompt is asked for before the turn, as a chat does; what is said is the content behind what
    the template puts in front of it when it thinks, and the end-of-turn token.
    """
    found = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(
            messages[:i], tokenize=False, add_generation_prompt=True
        )
        text = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        assert text.startswith(prompt)
        said = text[len(prompt) :].rstrip()
        before, ids = (
            tokenizer(part, add_special_tokens=False).input_ids for part in (prompt, prompt + said)
        )
        assert ids[: len(before)] == before
        with torch.no_grad():
            scores = model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
        nll = [-scores[k - 1, ids[k]].item() for k in range(len(before), len(ids))]
        found.append((before, ids[len(before) :], nll))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_published_templates_against_a_loop(ppl, chats, name):
    model, tokenizer = chats[name]
    expected = [np.concatenate([nll for *_, nll in loop(model, tokenizer, t)]) for t in TALKS]
    result = ppl.compute(predictions=TALKS, model=model, tokenizer=tokenizer)
    everything = np.concatenate(expected)
    assert result["num_tokens"] == len(everything)
    assert result["mean_nll"] == pytest.approx(everything.mean(), rel=2e-5)
    assert result["perplexities"] == pytest.approx(
        [math.exp(nll.mean()) for nll in expected], rel=2e-5
    )
    for talk, score in zip(TALKS, ppl.score(TALKS, model=model, tokenizer=tokenizer), strict=True):
        said = "".join(
            token for token, nll in zip(score.tokens, score.nll, strict=True) if nll == nll
        )
        assert said.count(END[name]) == sum(m["role"] == "assistant" for m in talk)
        assert "user" not in said
        assert "assistant" not in said
        assert "".join(score.text[a:b] for a, b in score.offsets) == score.text


@pytest.mark.parametrize("name", MARKED)
def test_marks_score_the_same_tokens(ppl, chats, name):
    model, tokenizer = chats[name]
    plain = ppl.score(TALKS, model=model, tokenizer=tokenizer)
    marked = ppl.score(TALKS, model=model, tokenizer=tokenizer, chat_template=marked_template(name))
    for one, other in zip(plain, marked, strict=True):
        assert one.tokens == other.tokens
        assert one.nll == pytest.approx(other.nll, nan_ok=True)


def scored(tokenizer, messages, **options):
    """What is scored, one string for each part of each text."""
    names = {"source": None, "variables": {}, "roles": ["assistant"]} | options
    template = chat_template.ChatTemplate(tokenizer, **names)
    return [[r.text[a:b] for a, b in r.scored] for r in template.renderings(messages)]


def test_each_turns_words(chats):
    talk = conversation("Hello!", "Hi there", "And?", "The end.", "Thanks")
    for name in ("chatml", "llama3", "gemma3", "phi3"):
        _, tokenizer = chats[name]
        assert scored(tokenizer, talk) == [[f"Hi there{END[name]}", f"The end.{END[name]}"]]
    assert scored(chats["mistral"][1], talk) == [[" Hi there</s>", " The end.</s>"]]


def test_qwen_drops_earlier_reasoning(ppl, chats):
    """Each turn is scored with the reasoning that it had, behind a past without."""
    model, tokenizer = chats["qwen3"]
    first, second = "<think>\nA list\n</think>\n\nHi", "<think>\nThe end\n</think>\n\nBye"
    talk = conversation("Hello!", first, "And?", second)
    assert scored(tokenizer, talk) == [[f"{first}<|im_end|>"], [f"{second}<|im_end|>"]]
    (score,) = ppl.score([talk], model=model, tokenizer=tokenizer)
    found = [nll for nll in score.nll if nll == nll]
    turns = loop(model, tokenizer, talk)
    assert found == pytest.approx(np.concatenate([nll for *_, nll in turns]).tolist(), rel=2e-5)
    past = tokenizer.decode(turns[1][0])
    assert "A list" not in past
    assert "Hi<|im_end|>" in past
    # Without reasoning in the past, one text is enough.
    _, last = scored(tokenizer, conversation("Hello!", "Hi", "And?", second))
    assert last == [f"{second}<|im_end|>"]


def test_variables_of_the_template(ppl, chats):
    model, tokenizer = chats["qwen3"]
    talk = conversation("Hello!", "Hi")
    assert scored(tokenizer, talk) == [["<think>\n\n</think>\n\nHi<|im_end|>"]]
    without = {"enable_thinking": False}
    assert scored(tokenizer, talk, variables=without) == [["Hi<|im_end|>"]]
    options = {"model": model, "tokenizer": tokenizer}
    thinking = ppl.compute(predictions=[talk], **options)
    answer = ppl.compute(predictions=[talk], **options, chat_template_kwargs=without)
    assert answer["num_tokens"] < thinking["num_tokens"]
    assert "chat_template_kwargs:none|" in thinking["signature"]
    assert thinking["signature"] != answer["signature"]


def test_a_system_message_that_the_template_moves(chats):
    """Mistral's template shows it with the last message of the user, and in no other place."""
    talk = conversation("Hello!", "Hi", "And?", "Bye", system="Be brief.")
    _, tokenizer = chats["mistral"]
    template = chat_template.ChatTemplate(tokenizer, None, {}, ["assistant"])
    texts = [rendering.text for rendering in template.renderings(talk)]
    assert texts == [
        "<s>[INST] Be brief.\n\nHello![/INST] Hi</s>",
        "<s>[INST] Hello![/INST] Hi</s>[INST] Be brief.\n\nAnd?[/INST] Bye</s>",
    ]


def test_what_the_template_adds_behind_the_end_of_a_turn_is_not_scored(chats):
    """Phi 3 ends each conversation with one token more, which stands behind no earlier turn."""
    _, tokenizer = chats["phi3"]
    talk = conversation("Hello!", "Hi", "And?", "Bye")
    assert scored(tokenizer, talk) == [["Hi<|end|>", "Bye<|end|>"]]


@pytest.mark.parametrize("content", ["Bye", ""])
def test_the_last_turn_ends_with_another_token_than_earlier_ones(chats, content):
    """In harmony, whose header stands in front of an empty content and stays."""
    header = "<|channel|>final<|message|>"
    talk = conversation("Hello!", "Hi", "And?", content)
    assert scored(chats["harmony"][1], talk) == [
        [f"{header}Hi<|return|>"],
        [f"{header}{content}<|return|>"],
    ]


@pytest.mark.parametrize(
    ("reasoning", "kept"),
    [
        ("<think>\n</think>\n", ""),  # QwQ
        ("<|channel>thought\n<channel|>", ""),  # Gemma 4
        ("<think></think>", "</think>"),  # DeepSeek V3
    ],
)
def test_empty_reasoning_that_the_template_leaves_out_of_a_turn(chats, reasoning, kept):
    """The model read it; what it said comes behind."""
    header = "<|im_start|>assistant\n"
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        f"{{% if m.role == 'assistant' %}}{{{{ {kept!r} }}}}{{% endif %}}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {header + reasoning!r} }}}}{{% endif %}}"
    )
    template = chat_template.ChatTemplate(chats["chatml"][1], source, {}, ["assistant"])
    talk = conversation("Hello!", "Hi", "And?", "Bye")
    first, second = template.renderings(talk)
    user = "<|im_start|>user\nHello!<|im_end|>\n"
    assert first.text == f"{user}{header}{reasoning}Hi<|im_end|>\n"
    assert second.text.endswith(f"And?<|im_end|>\n{header}{reasoning}Bye<|im_end|>\n")
    assert second.text.startswith(f"{user}{header}{kept}Hi<|im_end|>")
    assert [r.text[slice(*r.scored[0])] for r in (first, second)] == [
        "Hi<|im_end|>",
        "Bye<|im_end|>",
    ]
    opened = source.replace(repr(header + reasoning), repr(header + "<think>\n"))
    with pytest.raises(ValueError, match="saw before the assistant's turn 'Hi'. .* by .*<think>"):
        scored(chats["chatml"][1], talk, source=opened)


def test_a_conversation_that_the_assistant_begins(chats):
    talk = [{"role": "assistant", "content": "Welcome"}, *conversation("Hello!", "Hi")]
    for name in ("chatml", "llama3", "phi3"):
        assert scored(chats[name][1], talk) == [[f"Welcome{END[name]}", f"Hi{END[name]}"]]


def test_a_template_without_a_prompt(chats):
    source = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}"
        "{% endfor %}"
    )
    _, tokenizer = chats["chatml"]
    talk = conversation("Hello!", "Hi", "And?", "Bye")
    assert scored(tokenizer, talk, source=source) == [["Hi\n", "Bye\n"]]


def test_a_token_on_the_border_belongs_to_the_header(ppl, chats):
    """'Bot:' and a blank: the blank is a part of the first token of what is said."""
    model, tokenizer = chats["chatml"]
    source = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    talk = conversation("Hello!", " is a list")
    (score,) = ppl.score([talk], model=model, tokenizer=tokenizer, chat_template=source)
    said = [t for t, nll in zip(score.tokens, score.nll, strict=True) if nll == nll]
    assert "".join(said) == " is a list</s>"
    inside = source.replace("'assistant:'", "'assistant: '")
    talk = conversation("Hello!", "is a list")
    inside = inside.replace("':' + m", "': ' + m")
    (score,) = ppl.score([talk], model=model, tokenizer=tokenizer, chat_template=inside)
    said = [t for t, nll in zip(score.tokens, score.nll, strict=True) if nll == nll]
    assert "Ġis" in tokenizer.get_vocab()  # one token, which begins in the header
    assert "".join(said) == " a list</s>"


def test_other_roles(chats):
    talk = conversation("Hello!", "Hi", "And?", "Bye", system="Be brief.")
    _, tokenizer = chats["chatml"]
    users = [["Hello!<|im_end|>", "And?<|im_end|>"]]
    assert scored(tokenizer, talk, roles=["user"]) == users
    everybody = [["Be brief.", "Hello!", "Hi", "And?", "Bye"]]
    everybody = [[f"{content}<|im_end|>" for content in everybody[0]]]
    assert scored(tokenizer, talk, roles=["system", "user", "assistant"]) == everybody


@pytest.mark.parametrize("content", ["end", "d", "im", "<", "", " ", "user", "<|im_end|>"])
def test_a_content_that_is_elsewhere_in_the_text_too(chats, content):
    _, tokenizer = chats["chatml"]
    talk = conversation(content, content, "And?", content)
    (said,) = scored(tokenizer, talk, roles=["user", "assistant"])
    assert said == [f"{text}<|im_end|>" for text in (content, content, "And?", content)]


def test_a_turn_without_content(chats):
    _, tokenizer = chats["mistral"]
    assert scored(tokenizer, conversation("Hello!", "", "And?", "Bye")) == [[" </s>", " Bye</s>"]]
    function = {"name": "add", "arguments": {"x": 1}}
    call = {"type": "function", "id": "a" * 9, "function": function}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    ((said,),) = scored(tokenizer, [*conversation("Add"), turn])
    assert said.startswith("[TOOL_CALLS]")
    assert said.endswith("</s>")


def test_turns_of_the_assistant_one_after_the_other(chats):
    talk = [*conversation("Hello!", "Hi"), {"role": "assistant", "content": "there"}]
    _, tokenizer = chats["chatml"]
    assert scored(tokenizer, talk) == [["Hi<|im_end|>", "there<|im_end|>"]]
    # One that asks only behind the user, and one that joins both turns in one.
    asks = "{% if add_generation_prompt and messages[-1].role == 'user' %}"
    only_users = template_of("chatml").replace("{% if add_generation_prompt %}", asks)
    assert scored(tokenizer, talk, source=only_users) == [["Hi<|im_end|>", "there<|im_end|>"]]
    joins = (
        "{% for m in messages %}{% if loop.first or m.role != messages[loop.index0 - 1].role %}"
        "{{ '<|im_start|>' + m.role + '\n' }}{% endif %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    with pytest.raises(ValueError, match="saw before the assistant's turn 'there'"):
        scored(tokenizer, talk, source=joins)


def test_a_turn_that_ends_with_several_special_tokens(chats):
    """All of them stay when another message follows, and so belong to the turn."""
    _, tokenizer = chats["chatml"]
    talk = conversation("Hello!", "Hi</s>", "And?", "<s></s>")
    assert scored(tokenizer, talk) == [["Hi</s><|im_end|>", "<s></s><|im_end|>"]]


def test_marks_around_the_content_alone(ppl, chats):
    model, tokenizer = chats["chatml"]
    source = marked_template("chatml").replace(
        "{{message['content'] + '<|im_end|>'}}{% endgeneration %}",
        "{{message['content']}}{% endgeneration %}{{'<|im_end|>'}}",
    )
    talk = conversation("Hello!", "", "And?", "Bye", "Thanks")
    assert scored(tokenizer, talk, source=source) == [["", "Bye"]]
    options = {"model": model, "tokenizer": tokenizer, "chat_template": source}
    with pytest.warns(UserWarning, match="have no token to score"):
        result = ppl.compute(predictions=[talk[:2], talk], **options)
    assert math.isnan(result["perplexities"][0])


def test_what_a_template_gets_in_any_order(ppl, chats):
    """The signature is that of the meaning; a tool is known by its name."""
    model, tokenizer = chats["chatml"]

    def signature(variables):
        options = {"model": model, "tokenizer": tokenizer, "roles": ["user", "assistant"]}
        scorer = ppl.text_scorer(conversations=True, chat_template_kwargs=variables, **options)
        return scorer.signature(with_contexts=False)

    def add(x: int):
        """Add one.

        Args:
            x: a number.
        """

    def another():
        return add

    assert signature({"a": 1, "b": add}) == signature({"b": add, "a": 1})
    assert signature({"a": 1, "b": add}) != signature({"a": 1, "b": another})
    assert "|roles:assistant,user|" in signature({})
    for name in ("messages", "add_generation_prompt", "continue_final_message"):
        with pytest.raises(ValueError, match=f"chat_template_kwargs must not have '{name}'"):
            signature({name: True})


def test_bos_of_a_template_that_asks_for_a_system_message(ppl, chats):
    model, tokenizer = chats["llama3"]
    asks = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    options = {
        "model": model,
        "tokenizer": tokenizer,
        "chat_template": asks + template_of("llama3"),
    }
    signature = ppl.text_scorer(conversations=True, **options).signature(with_contexts=False)
    assert "|start_each_window:yes|" in signature


def test_words_of_a_conversation(ppl, chats):
    model, tokenizer = chats["chatml"]
    (score,) = ppl.score([TALKS[1]], model=model, tokenizer=tokenizer)
    words = [word for word in score.words if not math.isnan(word.nll)]
    assert [w.text for w in words] == [
        "Hi",
        "there,",
        "naïve",
        "🎉<|im_end|>",
        "The",
        "end.<|im_end|>",
    ]
    assert sum(word.nll for word in words) == pytest.approx(score.sums.nll_sum, rel=1e-6)


def test_bytes_and_words_are_those_of_what_is_said(ppl, chats):
    model, tokenizer = chats["chatml"]
    talk = conversation("What?", "A naïve list", "And?", "The end.")
    result = ppl.compute(predictions=[talk], model=model, tokenizer=tokenizer)
    assert result["num_bytes"] == len("A naïve listThe end.".encode())
    assert result["num_words"] == 5


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_a_template_sets_the_start_token(ppl, chats, name):
    model, tokenizer = chats[name]
    (score,) = ppl.score(TALKS[:1], model=model, tokenizer=tokenizer)
    assert score.tokens.count("<|begin_of_text|>") == (name == "llama3")
    signature = ppl.compute(predictions=TALKS, model=model, tokenizer=tokenizer)["signature"]
    assert f"|start:template|start_each_window:{'yes' if name == 'llama3' else 'no'}|" in signature
    assert "|roles:assistant|" in signature


def test_long_conversations_in_windows(ppl, chats):
    """Each said token once, with at least window - stride ids in front, where there are so many."""
    model, tokenizer = chats["llama3"]
    talk = conversation(*["What is a list? The end of all that is.", "A list is a list."] * 6)
    options = {"model": model, "tokenizer": tokenizer}
    (whole,) = ppl.score([talk], **options)
    ids = tokenizer(whole.text, add_special_tokens=False).input_ids
    assert ids[0] == tokenizer.bos_token_id
    (cut,) = ppl.score([talk], **options, window=64, stride=16)
    assert np.isnan(cut.nll).tolist() == np.isnan(whole.nll).tolist()
    places = np.flatnonzero(~np.isnan(whole.nll))
    first, stop = places[0], min(65, len(ids))
    expected = {}
    while first < places[-1] + 1:
        start = max(0, stop - 65)
        read = torch.tensor([[ids[0], *ids[start + 1 : stop - 1]]])
        with torch.no_grad():
            scores = model(read).logits[0].double().log_softmax(-1)
        for place in range(first, stop):
            expected[place] = -scores[place - start - 1, ids[place]].item()
        first, stop = stop, min(places[-1] + 1, stop + 16)
    found = [cut.nll[place] for place in places]
    assert found == pytest.approx([expected[place] for place in places], rel=2e-5)


def test_groups_batches_generators_and_pending(ppl, chats):
    model, tokenizer = chats["chatml"]
    options = {"model": model, "tokenizer": tokenizer}
    whole = ppl.compute(predictions=TALKS, groups=["a", "b", "a"], positions=True, **options)
    assert list(whole["groups"]) == ["a", "b"]
    assert sum(r["num_tokens"] for r in whole["positions"].values()) == whole["num_tokens"]
    streamed = ppl.compute(predictions=(talk for talk in TALKS), batch_size=1, **options)
    assert streamed["perplexities"] == pytest.approx(whole["perplexities"], rel=1e-6)
    ppl.add(prediction=TALKS[0])
    ppl.add_batch(predictions=TALKS[1:])
    assert ppl.compute(**options)["perplexities"] == whole["perplexities"]


def test_a_column_of_a_dataset(ppl, chats):
    import datasets

    model, tokenizer = chats["chatml"]
    data = datasets.Dataset.from_dict({"messages": TALKS})
    options = {"model": model, "tokenizer": tokenizer}
    found = ppl.compute(predictions=data["messages"], **options)
    assert found == ppl.compute(predictions=TALKS, **options)


def test_parts_of_content_and_calls_of_tools(chats):
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": " there"}]
    talk = [{"role": "user", "content": [{"type": "text", "text": "Hello!"}]}]
    talk += [{"role": "assistant", "content": parts}]
    assert scored(chats["gemma3"][1], talk) == [["Hithere<end_of_turn>"]]  # Gemma's trims each
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    talk = [*conversation("Add"), {"role": "assistant", "content": None, "tool_calls": [call]}]
    ((said,),) = scored(chats["qwen3"][1], talk)
    assert said.endswith('{"name": "add", "arguments": {"x": 1}}\n</tool_call><|im_end|>')


def test_comparison_and_saved_base(ppl, chats, tmp_path):
    model, tokenizer = chats["qwen3"]
    other, _ = make_chat("qwen3")
    with torch.no_grad():
        other.lm_head.weight.mul_(1.1)
    options = {"model": model, "tokenizer": tokenizer}
    reasoning = conversation("Hello!", "<think>\nA\n</think>\n\nHi", "And?", "Bye")
    talks = [*TALKS, reasoning]
    found = ppl.compare(talks, **options, base=other)
    assert found["num_tokens"] == ppl.compute(predictions=talks, **options)["num_tokens"]
    ppl.save_base(talks, tmp_path / "base", model=other, tokenizer=tokenizer)
    saved = ppl.compare(talks, **options, base=tmp_path / "base")
    for name in ("mean_kl", "perplexity_ratio", "mean_nll", "base_mean_nll"):
        assert saved[name] == pytest.approx(found[name], rel=1e-6)
    (comparison,) = ppl.compare_tokens([reasoning], **options, base=other)
    (score,) = ppl.score([reasoning], **options)
    assert comparison.nll == pytest.approx(score.nll, rel=1e-6, nan_ok=True)


def test_unscored_parts_are_grey(ppl, chats):
    model, tokenizer = chats["chatml"]
    (score,) = ppl.score(TALKS[:1], model=model, tokenizer=tokenizer)
    assert score._repr_html_().count('class="unscored"') == sum(nll != nll for nll in score.nll)
    assert "begin" not in score._repr_html_()


USER = {"role": "user", "content": "Hello!"}


@pytest.mark.parametrize(
    ("messages", "error", "match"),
    [
        ([USER], ValueError, "nothing to score .*'Hello!': it has no .* role assistant"),
        ([{"content": "Hi"}], TypeError, r"predictions\[0\]\[0\] has no role"),
        ([USER, {"role": "assistant"}], TypeError, r"predictions\[0\]\[1\] has no content"),
        ([USER, "Hi"], TypeError, r"predictions\[0\]\[1\] must be a message"),
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            TypeError,
            r"predictions\[0\]\[0\] has content that is no text",
        ),
        (
            [USER, USER, {"role": "assistant", "content": "Hi"}],
            ValueError,
            "template refuses .*'Hello!': .*must alternate user/assistant",
        ),
    ],
)
def test_bad_conversations(ppl, chats, messages, error, match):
    model, tokenizer = chats["gemma3"]
    with pytest.raises(error, match=match):
        ppl.compute(predictions=[messages], model=model, tokenizer=tokenizer)


def test_what_a_template_cannot_render(chats):
    _, tokenizer = chats["chatml"]
    for source, match in [
        ("{{ 1 // 0 }}", "refuses the conversation that begins 'Hello!': .*zero"),
        ("{{ messages[0].missing.key }}", "refuses .*no attribute"),
        ("{{ '\ud800' }}", "refuses .*surrogates"),
    ]:
        with pytest.raises(ValueError, match=match):
            scored(tokenizer, conversation("Hello!", "Hi"), source=source)


def test_arrays_of_messages_as_tables_have_them(ppl, chats):
    model, tokenizer = chats["chatml"]
    options = {"model": model, "tokenizer": tokenizer}
    arrays = [np.array(talk, dtype=object) for talk in TALKS]
    assert ppl.compute(predictions=arrays, **options) == ppl.compute(predictions=TALKS, **options)


def test_texts_and_conversations_do_not_mix(ppl):
    ppl.add_batch(predictions=["text"])
    with pytest.raises(ValueError, match="All are texts, or all are conversations"):
        ppl.add_batch(predictions=TALKS)
    assert len(ppl) == 1


def test_other_errors(ppl, chats, tokenizer):
    model, chat = chats["chatml"]
    options = {"model": model, "tokenizer": chat}
    with pytest.raises(TypeError, match=r"predictions\[1\] must be a conversation.*or all are"):
        ppl.compute(predictions=[TALKS[0], "text"], **options)
    with pytest.raises(TypeError, match=r"predictions\[1\] must be a string.*or all are"):
        ppl.compute(predictions=["text", TALKS[0]], **options)
    with pytest.raises(TypeError, match=r"got the messages of one. Wrap it in a list"):
        ppl.compute(predictions=TALKS[0], **options)
    with pytest.raises(ValueError, match="Conversations have no contexts"):
        ppl.compute(predictions=TALKS, contexts=["a", "b", "c"], **options)
    for name, value in [("preset", "lm-eval"), ("max_length", 9), ("add_start_token", False)]:
        with pytest.raises(ValueError, match=f"{name} has no meaning with conversations"):
            ppl.compute(predictions=TALKS, **options, **{name: value})
    for name, value in [("chat_template", "x"), ("roles", ["user"])]:
        with pytest.raises(ValueError, match=f"{name} has no meaning with texts that"):
            ppl.compute(predictions=["text"], **options, **{name: value})
    with pytest.raises(ValueError, match="corrected=True goes with texts"):
        ppl.score(TALKS, **options, corrected=True)
    with pytest.raises(TypeError, match="roles must be names"):
        ppl.compute(predictions=TALKS, **options, roles="assistant")
    with pytest.raises(ValueError, match="need a chat template, and this tokenizer has none"):
        ppl.compute(predictions=TALKS, model_id=TINY)
    unmarked = (
        template_of("chatml") + "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    )
    with pytest.raises(ValueError, match="marks nothing that the assistant says"):
        ppl.compute(predictions=TALKS, **options, chat_template=unmarked)
    asks_otherwise = template_of("chatml").replace("<|im_start|>assistant", "<|im_end|>bot")
    with pytest.raises(
        ValueError, match=r"saw before the assistant's turn .* by .*<\\|im_end\\|>bot"
    ):
        ppl.compute(predictions=TALKS, **options, chat_template=asks_otherwise)


def test_a_slow_tokenizer_is_refused(ppl, chats, tmp_path):
    model, _ = chats["chatml"]
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "<unk>": 2}))
    slow = transformers.models.ctrl.CTRLTokenizer
    (tmp_path / "merges.txt").write_text("#version\n")
    tokenizer = slow(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    with pytest.raises(ValueError, match="Conversations need a fast tokenizer"):
        ppl.compute(predictions=TALKS, model=model, tokenizer=tokenizer)


def test_a_template_that_prints_too_much_is_refused(ppl, chats, monkeypatch):
    model, tokenizer = chats["chatml"]
    monkeypatch.setattr(chat_template, "MOST_CHARACTERS", 1000)
    options = {"model": model, "tokenizer": tokenizer}
    endless = "{% for message in messages %}{{ 'x' * 1001 }}{% endfor %}"
    with pytest.raises(ValueError, match="template refuses .*: it makes .* characters of them"):
        ppl.compute(predictions=TALKS, **options, chat_template=endless)


def test_what_a_template_says_is_shown_as_escapes(ppl, chats):
    model, tokenizer = chats["chatml"]
    template = "{{ raise_exception('no\x1b[31m\u202e' + 'x' * 10000) }}"
    with pytest.raises(ValueError, match=r"template refuses .*: no\\x1b\[31m\\u202exxx") as error:
        ppl.compute(predictions=TALKS, model=model, tokenizer=tokenizer, chat_template=template)
    assert len(str(error.value)) < 2500
