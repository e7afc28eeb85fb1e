"""What visitors ask of the metric, within the limits; no page is needed for that."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from demo_models import LABEL, loaded, settings_with
from support import ROOT
from tokenizers import Tokenizer, normalizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from demo import models, service, views
from demo.conversation import read_conversation
from demo.settings import Model
from ppleval import Perplexity
from ppleval.texts import engine

TEXT = "Return the number of items in the list."


@pytest.fixture(scope="module")
def settings():
    return settings_with()


def words_of(metrics):
    return metrics.score(TEXT, LABEL, lambda *_: None).score.words


def test_words_are_corrected_where_the_tokens_allow_it(settings, monkeypatch):
    (expected,) = Perplexity().score([TEXT], model_id=str(ROOT / "tiny_model"), corrected=True)
    metrics = loaded(settings)
    corrected = [word.corrected_nll for word in expected.words]
    assert [word.corrected_nll for word in words_of(metrics)] == pytest.approx(corrected, rel=1e-5)

    def refuse(model):
        raise ValueError("corrected=True needs a causal model.")

    monkeypatch.setattr(engine, "word_start_ids", refuse)
    plain = words_of(metrics)
    assert [word.nll for word in plain] == pytest.approx([w.nll for w in expected.words], rel=1e-5)
    assert {word.corrected_nll for word in plain} == {None}


@pytest.fixture(scope="module")
def talk(settings):
    return settings.conversation_examples[0].text


def converse(metrics, pasted, label=LABEL):
    return metrics.converse(pasted, label, lambda *_: None)


def with_template(settings, template, **limits):
    """The bundled model with this template."""
    model = replace(settings.models[0], chat_template=template)
    limits = replace(settings.limits, **limits)
    return loaded(replace(settings, models=[model], limits=limits))


def test_a_conversation_has_the_numbers_of_compute(settings, talk):
    metrics = loaded(settings)
    found = converse(metrics, talk)
    messages = read_conversation(talk)
    options = {
        "model_id": str(ROOT / "tiny_model"),
        "chat_template": settings.models[0].chat_template,
    }
    expected = Perplexity().compute(predictions=[messages], **options)
    result = views.figures(found)
    for name in ("perplexity", "bits_per_byte", "num_tokens", "num_bytes", "num_words"):
        assert result[name] == pytest.approx(expected[name], rel=1e-6)
    assert result["signature"] == expected["signature"].replace(str(ROOT), "").replace("/", "")
    said = [m["content"] for m in messages if m["role"] == "assistant"]
    assert result["num_bytes"] == found.parts.num_bytes.sum() == len("".join(said))
    assert found.parts.nll.sum() == pytest.approx(found.score.sums.nll_sum)
    assert result["num_parts"] == len("".join(said)) // 32
    assert result["parts_ci_low"] < result["perplexity"] < result["parts_ci_high"]
    as_json = converse(metrics, json.dumps({"messages": messages}))
    assert as_json.score.nll == pytest.approx(found.score.nll, nan_ok=True)


def test_texts_and_conversations_share_a_model(settings, talk, monkeypatch):
    metrics = loaded(settings)
    model = metrics.models.scorer(LABEL).model
    monkeypatch.setattr(models, "Perplexity", None)
    assert metrics._conversation_scorer(metrics.models.scorer(LABEL), LABEL).model is model
    score = words_of(metrics)
    converse(metrics, talk)
    assert words_of(metrics) == score


def let_time_pass(monkeypatch):
    """Each look at the clock comes 1000 s after the one before."""
    clock = iter(range(0, 10**6, 1000))
    monkeypatch.setattr(service, "time", SimpleNamespace(monotonic=lambda: next(clock)))


def test_a_conversation_has_the_limits_of_a_text(settings, talk, monkeypatch):
    metrics = loaded(settings)
    for pasted, message in (
        ("", "There is no conversation. Type or paste one"),
        (None, "There is no conversation"),
        (" \n", "There is no conversation"),
        ("Assistant: \ud800", "The conversation holds half a character"),
        (
            "Assistant: " + "x" * 19_990,
            "The conversation has 20,001 characters; here at most 20,000",
        ),
        ("Assistant: " + "漢" * 6_000, "the conversation has 18,0.. tokens; here at most 6,000"),
        ("Hello", "The first line, 'Hello', begins no turn"),
        ("[" * 5_000, "nested too deeply"),
    ):
        with pytest.raises(service.Visible, match=message):
            converse(metrics, pasted)
    let_time_pass(monkeypatch)
    with pytest.raises(service.Visible, match="longer than 60 s"):
        converse(metrics, talk)


def test_several_renderings_of_a_conversation_count_together(settings):
    """Qwen 3's template drops earlier reasoning, so that each turn is a text of its own."""
    template = (ROOT / "tests/chat_templates/qwen3.jinja").read_text()
    pasted = "User: Go on.\nAssistant: <think>\nHm.\n</think>\n\nThe list.\n" * 3
    whole = converse(with_template(settings, template), pasted)
    assert whole.score.text.count("Go on.") == 1 + 2 + 3
    few = with_template(settings, template, text_tokens=len(whole.score.tokens) - 1)
    with pytest.raises(service.Visible, match=f"has {len(whole.score.tokens)} tokens; here at"):
        converse(few, pasted)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            None,
            rf"^{re.escape(LABEL)} cannot read this conversation\. Conversations need a chat temp",
        ),
        ("{{ raise_exception('Only one turn.') }}", "refuses the conversation .* Only one turn"),
        ("{{ messages[0].content + 1 }}", "The chat template refuses the conversation"),
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}",
            f"^No token of {re.escape(LABEL)} begins in what the assistant says",
        ),
    ],
)
def test_a_template_that_does_not_do(settings, template, message):
    with pytest.raises(service.Visible, match=message):
        converse(with_template(settings, template), "User: Name it.\nAssistant: a")


def test_no_more_texts_are_scored_at_once_than_configured(settings, monkeypatch):
    metrics = loaded(replace(settings, queue=replace(settings.queue, concurrency=2)))
    at_once, most, lock = 0, 0, threading.Lock()
    both = threading.Barrier(2)  # two at once there must be

    def slow_score(texts, **options):
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        both.wait(20)
        with lock:
            at_once -= 1
        return scorer_score(texts, **options)

    scorer = metrics.models.scorer(LABEL)
    scorer_score = scorer.score
    monkeypatch.setattr(scorer, "score", slow_score)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: metrics.score("text", LABEL, lambda *_: None), range(8)))
    assert most == 2


def test_who_is_stopped_while_waiting_takes_no_place(settings, monkeypatch):
    """Nor does it wait for the one who scores."""
    metrics = loaded(replace(settings, queue=replace(settings.queue, concurrency=1)))
    asked = []

    def stop(done, total):
        asked.append((done, total))
        raise service.Visible("This was stopped.")

    with metrics._slot(lambda *_: None), pytest.raises(service.Visible, match="stopped"):
        metrics.score(TEXT, LABEL, stop)
    with pytest.raises(service.Visible, match="stopped"):
        metrics.score(TEXT, LABEL, stop)
    assert asked == [(0, 0), (0, 0)]
    assert metrics.score(TEXT, LABEL, lambda *_: None).score.text == TEXT


HALF = Model("Half", "tiny_model", None, "bfloat16", None, "rounded", None)


def compare(metrics, text=TEXT):
    return metrics.compare(text, LABEL, HALF.label, lambda *_: None)


@pytest.fixture
def two_models():
    return loaded(settings_with(HALF))


def test_one_text_under_two_models(two_models):
    found = compare(two_models)
    tiny = str(ROOT / "tiny_model")
    (expected,) = Perplexity().compare_tokens(
        [TEXT], model_id=tiny, model_kwargs={"dtype": "bfloat16"}, base_id=tiny, base_kwargs={}
    )
    assert (found.label_a, found.label_b) == (LABEL, HALF.label)
    assert found.comparison.tokens == expected.tokens
    for name in ("nll", "base_nll", "kl"):
        values = getattr(found.comparison, name)
        assert values == pytest.approx(getattr(expected, name), rel=1e-5, nan_ok=True)


def words(*vocabulary):
    """A scorer's part that counts here: a tokenizer with these words."""
    ids = {word: i for i, word in enumerate(vocabulary)}
    backend = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    return SimpleNamespace(model=SimpleNamespace(tokenizer=tokenizer))


def test_which_models_have_the_same_tokens():
    one = words("<unk>", "a", "b")
    assert service._have_same_tokens(one, words("<unk>", "a", "b", "c"))
    assert not service._have_same_tokens(one, words("c", "<unk>", "d"))
    assert not service._have_same_tokens(one, words("<unk>", "b", "a"))  # under other ids


def test_a_text_that_gives_different_tokens_is_not_compared_token_by_token(two_models):
    tokenizer = two_models.models.scorer(HALF.label).model.tokenizer
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert compare(two_models) is None
    assert compare(two_models, TEXT.lower()) is not None


def test_a_comparison_has_the_limits_of_a_score(two_models, monkeypatch):
    for text, message in (
        (" ", "There is no text"),
        ("x" * 20_001, "20,001 characters"),
        ("漢" * 6_000, "has 18,001 tokens"),
    ):
        with pytest.raises(service.Visible, match=message):
            compare(two_models, text)
    let_time_pass(monkeypatch)
    with pytest.raises(service.Visible, match="longer than 120 s"):
        compare(two_models)


def test_the_end_refuses_what_is_new_and_stops_what_runs(settings, monkeypatch):
    metrics = loaded(settings)
    now = SimpleNamespace(s=1000.0)
    monkeypatch.setattr(service, "time", SimpleNamespace(monotonic=lambda: now.s))
    told = []
    tell = metrics._bounded(lambda *of: told.append(of))  # which a score calls while it runs
    metrics.end(3)
    now.s += 3
    tell(1, 2)
    assert told == [(1, 2)]
    now.s += 1
    with pytest.raises(service.Visible, match="is being restarted"):
        tell(2, 2)
    for ask in (
        lambda: metrics.score(TEXT, LABEL, tell),
        lambda: metrics.compare(TEXT, LABEL, LABEL, tell),
        lambda: converse(metrics, settings.conversation_examples[0].text),
        lambda: metrics.logits("a.npz", True, "", "", False),
    ):
        with pytest.raises(service.Visible, match="is being restarted"):
            ask()


@pytest.mark.parametrize("name", ["ignore_index", "mask_token_id"])
@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("9223372036854775808", "must fit into 64 bits, got 9223372036854775808"),
        ("1.5", "must be a whole number, got '1.5'"),
    ],
)
def test_a_bad_id_is_told_under_its_own_name(settings, tmp_path, name, typed, message):
    np.savez(tmp_path / "a.npz", logits=np.zeros((1, 1, 2)), labels=[[0]])
    ids = {"ignore_index": "", "mask_token_id": None, name: typed}
    with pytest.raises(service.Visible, match=f"^{name} {message}"):
        loaded(settings).logits(str(tmp_path / "a.npz"), True, **ids, shift=False)
