"""Words of a scored text: by hand, on a vocabulary of six tokens, and against a plain loop."""

import itertools
import math
import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from other_models import needs_network
from text_oracles import CONTEXT, TEXTS, TINY, config_of, ids_of, inputs_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ppleval.models import kinds
from ppleval.texts import engine, words
from ppleval.texts.words import words_of

NAN = math.nan


def make_score(pieces, nll=None, **more):
    """A score of tokens that are pieces of the text; nll 1, 2, 4... makes each sum another."""
    ends = [0, *itertools.accumulate(map(len, pieces))]
    defaults = {
        "text": "".join(pieces),
        "tokens": pieces,
        "offsets": list(itertools.pairwise(ends)),
        "nll": [2.0**i for i in range(len(pieces))] if nll is None else nll,
        "word_start_nll": None,
    }
    return SimpleNamespace(**(defaults | more))


def found_in(score):
    return [(word.text, list(word.tokens), word.nll) for word in words_of(score)]


# Which tokens are a word's


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["The", " cat", " s", "at", "."], [("The", 1), ("cat", 1), ("sat.", 3)]),
        # White space alone goes with the next word, at the end with the last.
        (["  ", "a", " ", "\n", "b", " ", "\t"], [("a", 2), ("b", 5)]),
        (["a", "\u3000", "b"], [("a", 1), ("b", 2)]),
        # A token of several words joins them, and those that it only reaches into.
        (["of the", " cat"], [("of the", 1), ("cat", 1)]),
        (["x of", " the c", "at", " y"], [("x of", 1), ("the cat", 2), ("y", 1)]),
        (["a b", "c d", "e"], [("a bc de", 3)]),
        # A token that ends with white space belongs to the word in front of that.
        (["Hi", ".\n\n", "You"], [("Hi.", 2), ("You", 1)]),
        ([], []),
        ([" ", "\n"], []),
    ],
)
def test_words_by_hand(pieces, expected):
    found = found_in(make_score(pieces))
    assert [(text, len(tokens)) for text, tokens, _ in found] == expected
    numbers = list(itertools.chain.from_iterable(tokens for _, tokens, _ in found))
    assert numbers == (list(range(len(pieces))) if expected else [])
    assert [nll for _, _, nll in found] == [sum(2.0**i for i in t) for _, t, _ in found]


@pytest.mark.parametrize(
    ("text", "ends", "expected"),
    [
        # Only the first token of a character has it; also if that character is white space.
        ("🎉 x", [1, 1, 1, 3], [("🎉", [0, 1, 2]), ("x", [3])]),
        ("a\u00a0b", [1, 2, 2, 3], [("a", [0]), ("b", [1, 2, 3])]),
        # A dummy prefix, and a special token at the end.
        ("漢 a", [0, 1, 3, 3], [("漢", [0, 1]), ("a", [2, 3])]),
        # Cut: there are words behind the last token.
        ("one two three", [3, 6], [("one", [0]), ("tw", [1])]),
    ],
)
def test_words_of_tokens_that_are_no_pieces(text, ends, expected):
    offsets = list(itertools.pairwise([0, *ends]))
    score = make_score(["?"] * len(ends), text=text, offsets=offsets)
    assert [(word, tokens) for word, tokens, _ in found_in(score)] == expected
    for word in words_of(score):
        assert score.text[word.start : word.end] == word.text


def test_words_that_are_not_scored():
    score = make_score(["The", " cat", " s", "at"], [NAN, 1.0, 2.0, NAN], word_start_nll=[0.0] * 5)
    the, cat, sat = words_of(score)
    assert math.isnan(the.nll)
    assert math.isnan(the.corrected_nll)
    assert cat.nll == cat.corrected_nll == 1
    assert math.isnan(sat.nll)
    # A start token of the tokenizer's own is no part of the text.
    score = make_score(["<s>", "The"], [NAN, 2.0], text="The", offsets=[(0, 0), (0, 3)])
    assert found_in(score) == [("The", [1], 2.0)]


def test_words_need_offsets():
    with pytest.raises(ValueError, match="a slow tokenizer does not give.*use_fast=True"):
        words_of(make_score(["a"], offsets=None))


@given(st.text(" \nab", max_size=20), st.lists(st.integers(0, 20)))
def test_every_word_and_every_token_counts_once(text, cuts):
    ends = [*sorted(min(cut, len(text)) for cut in cuts), len(text)]
    offsets = list(itertools.pairwise([0, *ends]))
    score = make_score(["?"] * len(ends), text=text, offsets=offsets)
    found = words_of(score)
    assert list(itertools.chain.from_iterable(word.text.split() for word in found)) == text.split()
    numbers = list(itertools.chain.from_iterable(word.tokens for word in found))
    assert numbers == (list(range(len(ends))) if text.split() else [])
    # Only words that share a token are one.
    places = [match.span() for match in re.finditer(r"\S+", text)]
    joints = [
        any(a < end and b > start for a, b in offsets)
        for (_, end), (start, _) in itertools.pairwise(places)
    ]
    assert len(found) == len(places) - sum(joints)


# The correction, by hand


def test_the_correction_by_hand():
    score = make_score(["a", " b", "c", " d"], word_start_nll=[9.0, 0.5, 9.0, 0.25, 0.125])
    assert [word.corrected_nll for word in words_of(score)] == [
        1 + 0.5,
        2 + 4 + 0.25 - 0.5,
        8 + 0.125 - 0.25,
    ]


@pytest.mark.parametrize(
    ("pieces", "more"),
    [
        (["Hi", ".\n\n", "You", " "], {}),
        # Llama 3's tokenizer may leave the line ends out of the offsets.
        (["Hi", ".\n\n", "You", " "], {"offsets": [(0, 2), (2, 3), (3, 8), (8, 9)]}),
    ],
)
def test_behind_white_space_a_word_begins_anyway(pieces, more):
    score = make_score(pieces, word_start_nll=[9.0, 9.0, 5.0, 9.0, 5.0], **more)
    assert [(word.text, word.corrected_nll) for word in words_of(score)] == [
        ("Hi.", 3),
        ("You", 12),
    ]


PIECES = ["</s>", "a", "b", "Ġa", "Ġb", "Ċ"]
# P(next | last); a word begins with one of </s>, Ġa, Ġb and Ċ, after the last with this share.
NEXT = {
    "</s>": [0.10, 0.40, 0.20, 0.10, 0.10, 0.10],  # 0.4
    "a": [0.05, 0.30, 0.20, 0.20, 0.15, 0.10],  # 0.5
    "b": [0.10, 0.10, 0.10, 0.30, 0.30, 0.10],  # 0.8
    "Ġa": [0.02, 0.50, 0.40, 0.03, 0.03, 0.02],  # 0.1
    "Ġb": [0.05, 0.25, 0.50, 0.10, 0.05, 0.05],  # 0.25
    "Ċ": [0.20, 0.20, 0.30, 0.10, 0.10, 0.10],  # 0.5
}


class Bigrams(transformers.PreTrainedModel):
    """The logits are those of the last id."""

    config_class = transformers.LlamaConfig
    _supports_sdpa = True

    def __init__(self, config, table):
        super().__init__(config)
        self.table = torch.nn.Embedding.from_pretrained(table)

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        return transformers.modeling_outputs.CausalLMOutput(logits=self.table(input_ids))


def unigrams(pieces, pre_tokenizer, decoder):
    backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoder
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="</s>", eos_token="</s>")


@pytest.fixture(scope="module")
def six():
    """A model and a tokenizer of six tokens."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = unigrams(PIECES, byte_level, decoders.ByteLevel())
    table = torch.tensor([NEXT[piece] for piece in PIECES]).log()
    return {
        "model": Bigrams(config_of("llama", len(PIECES)), table).eval(),
        "tokenizer": tokenizer,
    }


@pytest.mark.parametrize(
    ("context", "text", "expected"),
    [
        # (word, p of its tokens, p of a word behind it, p of a word in front of it)
        (None, "ab b", [("ab", 0.4 * 0.2, 0.8, 1), ("b", 0.3, 0.25, 0.8)]),
        (None, "a a a", [("a", 0.4, 0.5, 1), ("a", 0.2, 0.1, 0.5), ("a", 0.03, 0.1, 0.1)]),
        (None, "a\nb", [("a", 0.4, 0.5, 1), ("b", 0.1 * 0.3, 0.8, 0.5)]),
        (None, "a\n", [("a", 0.4 * 0.1, 1, 1)]),  # white space at the end
        (None, " a", [("a", 0.1, 0.1, 0.4)]),  # and at the start
        ("a", " b", [("b", 0.15, 0.25, 0.5)]),
        ("a", "b", [("b", 0.2, 0.8, 1)]),  # no word begins here
        ("", "b", [("b", 0.2, 0.8, 1)]),
        (None, "\n", []),
        (None, "", []),
    ],
)
def test_six_tokens_by_hand(ppl, six, context, text, expected):
    contexts = None if context is None else [context]
    (score,) = ppl.score([text], contexts=contexts, corrected=True, **six)
    assert [word.text for word in score.words] == [word for word, *_ in expected]
    for word, (_, p, behind, front) in zip(score.words, expected, strict=True):
        assert math.exp(-word.nll) == pytest.approx(p, rel=1e-6)
        assert math.exp(-word.corrected_nll) == pytest.approx(p * behind / front, rel=1e-6)
    (plain,) = ppl.score([text], contexts=contexts, **six)
    assert [(word.text, word.nll, word.corrected_nll) for word in plain.words] == [
        (word.text, word.nll, None) for word in score.words
    ]


def test_words_of_a_tokenizer_with_a_dummy_prefix(ppl, six):
    """As Llama 2's: each first word is read as if a space stood in front of it."""
    pieces = ["</s>", "a", "b", "▁a", "▁b", "▁"]
    metaspace = {"replacement": "▁", "prepend_scheme": "always"}
    tokenizer = unigrams(
        pieces, pre_tokenizers.Metaspace(**metaspace), decoders.Metaspace(**metaspace)
    )
    starts = words.word_start_ids
    model = kinds.CausalModel(six["model"], tokenizer)
    assert starts(model).tolist() == [0, 3, 4, 5]
    (score,) = ppl.score(["ab b"], model=six["model"], tokenizer=tokenizer, corrected=True)
    assert [word.text for word in score.words] == ["ab", "b"]
    first, second = (math.exp(-word.corrected_nll) for word in score.words)
    assert first == pytest.approx(0.1 * 0.4 * 0.8)  # p of ▁a, b, and of a word behind b
    assert second == pytest.approx(0.3 * 0.25 / 0.8)


# The correction, against a plain loop


def plain_word_start_nll(model, tokenizer, ids):
    """Oracle: for each id but the first, and behind the last, from the window that scores it."""
    vocab = tokenizer.get_vocab()
    white = "ĉĊċČčĜĝĞğĠ"  # tab, line feed and so on, as GPT-2 spells bytes
    begin = sorted({i for token, i in vocab.items() if token[0] in white} | {vocab["<|eos|>"]})

    def nll(start, stop):  # behind each of ids[start:stop]
        with torch.no_grad():
            logits = model(torch.tensor([inputs_of(ids, start, stop)])).logits[0].double()
        return (-logits.log_softmax(-1)[:, begin].logsumexp(1)).tolist()

    found, first, stop = [], 1, min(len(ids), CONTEXT + 1)
    while first < len(ids):
        start = max(0, stop - CONTEXT - 1)
        found += nll(start, stop - 1)[first - 1 - start :]
        first, stop = stop, min(len(ids), stop + CONTEXT // 2)
    return found + nll(max(0, len(ids) - CONTEXT), len(ids))[-1:]


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma", "qwen"])
def test_the_correction_equals_a_plain_loop(ppl, models, name):
    """Some texts fill several windows of 24 tokens; Qwen has no start token."""
    model, tokenizer = models[name]
    call = {"model": model, "tokenizer": tokenizer}
    scores = ppl.score(TEXTS, corrected=True, **call)
    for score, plain in zip(scores, ppl.score(TEXTS, **call), strict=True):
        assert score.nll == pytest.approx(plain.nll, rel=1e-6, nan_ok=True)
        ids = ids_of(tokenizer, score.text)
        expected = [NAN] if name == "qwen" else []
        expected += plain_word_start_nll(model, tokenizer, ids)
        if len(ids) == 1:  # a token that nothing predicts
            expected = [NAN, NAN]
        assert score.word_start_nll == pytest.approx(expected, rel=2e-5, abs=1e-5, nan_ok=True)
        assert_adds_up(score)


def assert_adds_up(score):
    """The words are those of str.split; they add up to the text, the corrected ones to it and its
    ends."""
    assert [word.text for word in score.words] == score.text.split()
    scored = [word for word in score.words if not math.isnan(word.nll)]
    if not scored:
        return
    first = scored[0].tokens.start
    total = math.fsum(score.nll[first:])
    assert math.fsum(word.nll for word in scored) == pytest.approx(total)
    end = 0 if score.text[-1].isspace() else score.word_start_nll[-1]
    front = score.word_start_nll[first] if first > 0 or score.text[0].isspace() else 0
    corrected = math.fsum(word.corrected_nll for word in scored)
    assert corrected == pytest.approx(total + end - front)


@pytest.mark.parametrize("batch_size", [None, 1, 2])
@pytest.mark.parametrize("options", [{}, {"start_each_window": False}, {"stride": CONTEXT}])
def test_settings_of_windows(ppl, models, options, batch_size):
    model, tokenizer = models["llama"]
    call = {"model": model, "tokenizer": tokenizer, "batch_size": batch_size, **options}
    told = []
    scorer = ppl.text_scorer(model=model, tokenizer=tokenizer, **options)
    scores = list(
        scorer.score(
            TEXTS, corrected=True, batch_size=batch_size, progress=lambda *now: told.append(now)
        )
    )
    plain = ppl.score(TEXTS, **call)
    for score, expected in zip(scores, plain, strict=True):
        assert score.nll == pytest.approx(expected.nll, rel=1e-6)
        assert_adds_up(score)
    # The ends are no scored tokens.
    num_tokens = sum(len(score.nll) for score in plain)
    assert told[-1] == (num_tokens, num_tokens)


def test_words_behind_a_context_are_those_of_the_whole(ppl, models):
    model, tokenizer = models["gpt2"]
    call = {"model": model, "tokenizer": tokenizer, "corrected": True}
    context, text = "Return the number", " of items in the list."
    (whole,), (behind,) = (
        ppl.score([context + text], **call),
        ppl.score([text], contexts=[context], **call),
    )
    expected = [(word.text, word.nll, word.corrected_nll) for word in whole.words[3:]]
    found = [(word.text, word.nll, word.corrected_nll) for word in behind.words]
    assert [word for word, *_ in found] == text.split()
    for word, other in zip(found, expected, strict=True):
        assert word[0] == other[0]
        assert word[1:] == pytest.approx(other[1:], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "num_unknown"),
    [
        ({"add_start_token": False}, 1),
        ({"max_length": 12}, 0),
        ({"preset": "hf-docs"}, 0),
        ({"preset": "lm-eval"}, 0),
        ({"top_k": 2, "positions": True}, 0),
    ],
)
def test_other_settings(ppl, models, options, num_unknown):
    """Without a start token, the first word is not scored."""
    model, tokenizer = models["llama"]
    call = {"model": model, "tokenizer": tokenizer, **options}
    (score,), (plain,) = ppl.score(TEXTS[:1], corrected=True, **call), ppl.score(TEXTS[:1], **call)
    assert score.nll == pytest.approx(plain.nll, rel=1e-6, nan_ok=True)
    assert score.sums.nll_sum == pytest.approx(plain.sums.nll_sum)
    known = [word for word in score.words if not math.isnan(word.corrected_nll)]
    assert len(known) == len(score.words) - num_unknown > 2
    total = math.fsum(score.nll[known[0].tokens.start :])
    assert math.fsum(word.nll for word in known) == pytest.approx(total)


def test_windows_that_do_not_reach_the_end(ppl, models):
    """llama.cpp scores the second half of each chunk, and drops the rest."""
    model, tokenizer = models["llama"]
    call = {"model": model, "tokenizer": tokenizer, "preset": "llama.cpp", "window": 12}
    (score,) = ppl.score(TEXTS[2:3], corrected=True, **call)
    (plain,) = ppl.score(TEXTS[2:3], **call)
    assert score.nll == pytest.approx(plain.nll, rel=1e-6, nan_ok=True)
    assert math.isnan(score.word_start_nll[-1])
    known = [word for word in score.words if not math.isnan(word.corrected_nll)]
    assert 0 < len(known) < sum(not math.isnan(word.nll) for word in score.words)


def test_every_word_of_the_bundled_model(ppl):
    for score in ppl.score(TEXTS, model_id=TINY, corrected=True):
        assert_adds_up(score)


def test_the_score_of_no_words(ppl):
    (score,) = ppl.score([""], model_id=TINY, corrected=True)
    assert score.words == []
    assert len(score.word_start_nll) == 1
    assert math.isnan(score.word_start_nll[0])


# Refusals


def test_what_cannot_be_corrected_is_named(ppl, models):
    model, _ = models["llama"]
    with pytest.raises(TypeError, match="corrected must be True or False, got 'yes'"):
        ppl.score(["a"], model_id=TINY, corrected="yes")
    backend = Tokenizer(_wordpiece())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    pieces = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    with pytest.raises(ValueError, match=r"carry the space.*reads 'a' behind a space as \['a'\]"):
        ppl.score(["a b"], model=model, tokenizer=pieces, corrected=True)
    slow = transformers.ByT5Tokenizer()
    with pytest.raises(ValueError, match="needs a fast tokenizer, got ByT5Tokenizer"):
        ppl.score(["a b"], model=model, tokenizer=slow, add_start_token=1, corrected=True)
    pair = ppl.text_comparer(model_id=TINY, base_id=TINY)
    with pytest.raises(ValueError, match="needs one causal language model, and .*base.* is"):
        list(pair.score(["a b"], corrected=True))


def _wordpiece():
    vocab = {token: i for i, token in enumerate(["[UNK]", "a", "b", "##a", "##b"])}
    return models.WordPiece(vocab, unk_token="[UNK]")


def test_tokens_that_carry_the_space_behind_them_are_refused(ppl, models):
    """As OpenAI's first GPT."""
    backend = Tokenizer(_bpe())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(ValueError, match="carry the space in front of them"):
        ppl.score(["a b"], model=models["llama"][0], tokenizer=tokenizer, corrected=True)


def _bpe():
    vocab = {token: i for i, token in enumerate(["a", "b", "a</w>", "b</w>"])}
    return models.BPE(vocab, [], end_of_word_suffix="</w>")


# Published


@needs_network
def test_what_minicons_documents(ppl, monkeypatch):
    """The surprisals of its documentation for gpt2-xl, in bits, with and without the correction.

    It takes tokens that begin with a space, and neither line ends nor the end of the text.
    """
    scorer = ppl.text_scorer(model_id="openai-community/gpt2-xl")
    spaces = [i for token, i in scorer.model.tokenizer.get_vocab().items() if token[0] == "Ġ"]
    monkeypatch.setattr(engine, "word_start_ids", lambda model: torch.tensor(sorted(spaces)))
    (score,) = scorer.score(["I was a mat in France."], corrected=True)
    expected = {
        "I": (5.85347, 6.30075),
        "was": (4.28425, 3.84017),
        "a": (4.67378, 4.67617),
        "mat": (16.34461, 21.33536),
        "in": (10.78263, 5.80117),
        "France.": (10.71275 + 3.02450, 10.69786 + 3.33351),
    }
    assert [word.text for word in score.words] == list(expected)
    for word in score.words:
        bits = word.nll / math.log(2), word.corrected_nll / math.log(2)
        assert bits == pytest.approx(expected[word.text], abs=2e-3)
