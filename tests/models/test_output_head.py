"""The output layer is used where it gives the model's own logits, and only there."""

import logging
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from text_oracles import (
    CONTEXT,
    TEXTS,
    TINY,
    assert_equals,
    config_of,
    expected_result,
    grown,
    ids_of,
    plain_nll,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppleval import distributed
from ppleval.logits import tiles
from ppleval.models import language_model as models_language_model


class Halved(transformers.LlamaForCausalLM):
    """It changes its logits, and its configuration does not say so."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output


def with_changed_logits(name, vocab_size):
    if name == "halved":
        return Halved(config_of("llama", vocab_size))
    if name in ("llama", "gemma"):
        config = config_of(name, vocab_size)
        # With the usual small initial weights soft-capping is below any rounding error.
        config.initializer_range = 0.02
        config.final_logit_softcapping = 30.0
        return AutoModelForCausalLM.from_config(config)
    shape = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
    shape |= {"vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 64}
    shape |= {"max_position_embeddings": CONTEXT}
    if name == "cohere":
        config = transformers.CohereConfig(**shape, logit_scale=0.0625, initializer_range=0.5)
    else:
        config = transformers.GraniteConfig(**shape, logits_scaling=8.0, initializer_range=0.5)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", ["llama", "gemma", "cohere", "granite", "halved"])
def test_models_that_change_their_logits(ppl, name, caplog):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = with_changed_logits(name, len(tokenizer)).eval()
    with caplog.at_level(logging.WARNING):
        result = ppl.compute(predictions=TEXTS, model=model, tokenizer=tokenizer)
        score = ppl.score(TEXTS, model=model, tokenizer=tokenizer, top_k=3)
    assert_equals(result, expected_result(model, tokenizer, TEXTS))
    for text in score:  # the likeliest are on the scale of the others
        for nll, rank, expected in zip(text.nll, text.ranks, text.expected, strict=True):
            if 0 < rank <= 3:
                assert nll == pytest.approx(expected[rank - 1][1], abs=1e-4)
    # What the configuration states needs no logits of whole batches.
    assert ("are not those of its output layer" in caplog.text) == (name == "halved")


@pytest.mark.parametrize(
    "stated",
    [
        {"logit_scale": "inv_sqrt_d_model"},  # MPT's, which transformers does not read
        {"logit_scale": [1.0]},
        {"final_logit_softcapping": 0.0},
        {"logit_scale": -1.0},
    ],
    ids=str,
)
def test_what_a_configuration_states_may_be_anything(ppl, stated):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = AutoModelForCausalLM.from_config(config_of("llama", len(tokenizer))).eval()
    for name, value in stated.items():
        setattr(model.config, name, value)
    result = ppl.compute(predictions=TEXTS, model=model, tokenizer=tokenizer)
    assert_equals(result, expected_result(model, tokenizer, TEXTS))


def test_logits_of_a_bfloat16_model_are_not_rounded(ppl, models):
    config = config_of("llama", len(models["llama"][1]))
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    tokenizer = models["llama"][1]
    (score,) = ppl.score([TEXTS[5]], model=model, tokenizer=tokenizer, add_start_token=False)
    ids = ids_of(tokenizer, TEXTS[5], start=False)
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([ids[:-1]])).last_hidden_state[0]
        logits = hidden.double() @ model.lm_head.weight.double().t()
        rounded = model.lm_head(hidden)
    targets = torch.tensor(ids[1:])
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert score.nll[1:] == pytest.approx(expected.tolist(), abs=1e-4)
    worse = torch.nn.functional.cross_entropy(rounded.double(), targets, reduction="none")
    assert (worse - expected).abs().max() > 1e-3


def test_logits_never_exist_for_a_whole_batch(ppl, models, monkeypatch):
    """The output layer gives one tile at a time, and only of the rows that are scored."""
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 3072 * 5)
    model, tokenizer = models["llama"]
    sizes = []
    original = torch.mm

    def counted(a, b, **kwargs):
        sizes.append(len(a) * b.shape[1])
        return original(a, b, **kwargs)

    monkeypatch.setattr(torch, "mm", counted)
    result = ppl.compute(predictions=TEXTS, model=model, tokenizer=tokenizer)
    assert max(sizes) <= 3072 * 5
    assert sum(sizes) == result["num_tokens"] * model.config.vocab_size


def test_an_output_layer_that_is_not_plain(ppl, models):
    """Such as one of PEFT or of a quantised model: it is called, not multiplied with."""

    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden):
            return self.inner(hidden) * 1.5

    model, tokenizer = models["llama"]
    plain = model.get_output_embeddings()
    model.set_output_embeddings(Wrapped(plain))
    try:
        result = ppl.compute(predictions=TEXTS, model=model, tokenizer=tokenizer)
        assert_equals(result, expected_result(model, tokenizer, TEXTS))
    finally:
        model.set_output_embeddings(plain)


def test_an_output_layer_with_hooks(ppl, models):
    model, tokenizer = models["llama"]
    handle = model.lm_head.register_forward_hook(lambda module, args, output: output * 0.5)
    try:
        result = ppl.compute(predictions=TEXTS, model=model, tokenizer=tokenizer)
        assert_equals(result, expected_result(model, tokenizer, TEXTS))
    finally:
        handle.remove()


IN_TEXTS = [16, 467, 1141]  # the most frequent ids of TEXTS, which are not in the probe


class Behind(transformers.LlamaForCausalLM):
    """A Llama that does something to its logits, which its configuration does not state."""

    def change(self, logits, ids):
        raise NotImplementedError

    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids=input_ids, **kwargs)
        output.logits = self.change(output.logits, input_ids)
        return output


class Biased(Behind):
    """A small number for each id, added in place: the layer's output is changed itself."""

    def __init__(self, config):
        super().__init__(config)
        self.extra = torch.nn.Parameter(0.05 * torch.randn(config.vocab_size).sign())

    def change(self, logits, ids):
        return logits.add_(self.extra)


class Bigrams(Behind):
    """A table of which a few rows are not zero, which are none of the probe's."""

    def __init__(self, config):
        super().__init__(config)
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)
        torch.nn.init.zeros_(self.table.weight)
        with torch.no_grad():
            self.table.weight[IN_TEXTS] = torch.randn(len(IN_TEXTS), config.vocab_size)

    def change(self, logits, ids):
        return logits + self.table(ids)


class RareBigrams(Bigrams):
    """The table is read only where it matters."""

    def change(self, logits, ids):
        return super().change(logits, ids) if self.table.weight[ids].any() else logits


class Tempered(Behind):
    def change(self, logits, ids):
        return logits / 1.001


class Banned(Behind):
    """Three ids that are as good as impossible."""

    def change(self, logits, ids):
        logits = logits.clone()
        logits[..., -3:] = -1e9
        return logits


class Impossible(Banned):
    """Three more that are impossible."""

    def change(self, logits, ids):
        return super().change(logits, ids).where(torch.arange(logits.shape[-1]) > 2, -torch.inf)


class Cached(Behind):
    """A mixture with what was read before, as of a pointer or of a cache."""

    def change(self, logits, ids):
        counts = torch.nn.functional.one_hot(ids, logits.shape[-1]).cumsum(1)
        cache = counts / counts.sum(-1, keepdim=True)
        return (0.9 * logits.softmax(-1) + 0.1 * cache).log()


class AtOneId(Behind):
    """Only where a certain id was read: an index of the shape of the ids."""

    def change(self, logits, ids):
        logits = logits.clone()
        logits[ids == IN_TEXTS[0]] *= 0.5
        return logits


class SeveralAhead(transformers.LlamaForCausalLM):
    """Its output layer predicts the next token, and then the one behind that."""

    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids=input_ids, output_hidden_states=True, **kwargs)
        self.ahead = self.lm_head(output.hidden_states[-1].flip(-1))
        return output


class InChunks(transformers.LlamaForCausalLM):
    """Its output layer runs on four positions at a time."""

    def forward(self, input_ids=None, **kwargs):
        hidden = self.model(input_ids=input_ids).last_hidden_state
        chunks = [self.lm_head(chunk) for chunk in hidden.split(4, dim=1)]
        return transformers.modeling_outputs.CausalLMOutput(logits=torch.cat(chunks, 1))


class InRows(InChunks):
    """Of several rows its output layer runs on one at a time, which a single row does not show."""

    def forward(self, input_ids=None, **kwargs):
        hidden = self.model(input_ids=input_ids).last_hidden_state
        logits = torch.cat([self.lm_head(row) for row in hidden.split(1)])
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


class AtLongTexts(Behind):
    """Only for inputs longer than those of the probe, and alike for all ids."""

    def change(self, logits, ids):
        return logits * 0.5 if ids.shape[1] > 64 else logits


# Short ones and a long one, with these ids.
FEW_TEXTS = [*TEXTS[:2], "Return a list. " * 5]
BEHIND = [Biased, Bigrams, RareBigrams, Tempered, Banned, Impossible, Cached, AtOneId]
SEVERAL_CALLS = [SeveralAhead, InChunks, InRows]


def made(kind, tokenizer, dtype=torch.float32):
    torch.manual_seed(0)
    return grown(kind(config_of("llama", len(tokenizer)))).to(dtype)


@pytest.mark.parametrize("kind", BEHIND + SEVERAL_CALLS, ids=lambda kind: kind.__name__)
def test_what_a_model_does_behind_its_output_layer_counts(ppl, tokenizer, kind, caplog):
    model = made(kind, tokenizer)
    with caplog.at_level(logging.WARNING):
        result = ppl.compute(predictions=FEW_TEXTS, model=model, tokenizer=tokenizer)
    assert_equals(result, expected_result(model, tokenizer, FEW_TEXTS))
    assert "are not those of its output layer" in caplog.text


def test_what_a_model_does_to_long_texts_only_counts(ppl, tokenizer):
    model, text = made(AtLongTexts, tokenizer), "Return a list. " * 30
    model.config.max_position_embeddings = 128
    scorer = ppl.text_scorer(model=model, tokenizer=tokenizer)
    assert scorer.model.head is not None
    (score,) = ppl.score([text], model=model, tokenizer=tokenizer)
    ids = ids_of(tokenizer, text)
    assert 64 < len(ids) <= 128
    assert score.nll == pytest.approx(plain_nll(model, ids, 1, len(ids)), rel=2e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_small_bias_is_found_in_every_dtype(ppl, tokenizer, dtype):
    """Logits that are the layer's output to the last bit need no room for rounding."""
    scorer = ppl.text_scorer(model=made(Biased, tokenizer, dtype), tokenizer=tokenizer)
    assert scorer.model.head is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["gemma", "cohere", "granite"])
def test_what_is_stated_is_used_in_every_dtype(ppl, tokenizer, name, dtype):
    model = with_changed_logits(name, len(tokenizer)).eval().to(dtype)
    scorer = ppl.text_scorer(model=model, tokenizer=tokenizer)
    assert not scorer.model.head.transform.is_identity


def test_a_small_bias_beside_a_stated_cap_is_found(ppl, tokenizer):
    model = with_changed_logits("gemma", len(tokenizer)).eval()
    bias = 1e-3 * torch.randn(len(tokenizer))
    model.register_forward_hook(lambda module, args, output: add_to_logits(output, bias))
    result = ppl.compute(predictions=FEW_TEXTS, model=model, tokenizer=tokenizer)
    assert ppl.text_scorer(model=model, tokenizer=tokenizer).model.head is None
    assert_equals(result, expected_result(model, tokenizer, FEW_TEXTS))


def add_to_logits(output, bias):
    output.logits = output.logits + bias
    return output


def test_what_training_puts_behind_the_output_layer_counts(ppl, tokenizer):
    """It was zero when the model was probed, as an adapter is before its first step."""
    model = made(Biased, tokenizer)
    with torch.no_grad():
        model.extra.zero_()
    call = {"predictions": FEW_TEXTS, "model": model, "tokenizer": tokenizer}
    before = ppl.compute(**call)
    assert_equals(before, expected_result(model, tokenizer, FEW_TEXTS))
    (model.extra * torch.randn(len(tokenizer))).sum().backward()
    torch.optim.SGD([model.extra], lr=1.0).step()
    after = ppl.compute(**call)
    assert_equals(after, expected_result(model, tokenizer, FEW_TEXTS))
    assert after["perplexity"] != pytest.approx(before["perplexity"], rel=1e-2)


def test_the_positions_of_the_probe_are_bounded_by_its_logits(ppl, tokenizer, monkeypatch):
    def num_positions(vocab_size):
        config = config_of("llama", vocab_size)
        config.max_position_embeddings = 512
        model = transformers.LlamaForCausalLM(config).eval()
        seen = []
        model.lm_head.register_forward_hook(lambda *call: seen.append(call[2].shape[1]))
        ppl.text_scorer(model=model, tokenizer=tokenizer)
        return max(seen)

    assert num_positions(3072) == 64 + 2  # and two large rows
    monkeypatch.setattr(models_language_model, "LOGITS_OF_PROBE", 3072 * 30)
    assert num_positions(3072) == 30 + 2
    monkeypatch.setattr(models_language_model, "LOGITS_OF_PROBE", 1)
    assert num_positions(3072) == 24  # of another probe


def test_processes_in_step_do_not_make_a_pass_of_their_own(ppl, tokenizer):
    """One that runs its output layer on single rows, beside processes that would wait for ever."""
    language_model = ppl.text_scorer(model=made(InRows, tokenizer), tokenizer=tokenizer).model
    two = distributed.Processes(rank=0, size=2)
    language_model.ranks = replace(language_model.ranks, in_step=two)
    spans = [models_language_model.Span([1, 2, 3], [0, 1], [2, 3])] * 2
    with pytest.raises(ValueError, match="it runs 2 times in a forward pass, for some texts only"):
        language_model.launch(spans)
    assert language_model.head is not None


def test_a_base_is_not_saved_with_rows_of_two_kinds(ppl, tokenizer, tmp_path):
    """Hidden states, and then logits."""
    call = {"model": made(InRows, tokenizer), "tokenizer": tokenizer}
    with pytest.raises(ValueError, match="Delete .*, and save the base again"):
        ppl.save_base(FEW_TEXTS, tmp_path / "base", **call)
    shutil.rmtree(tmp_path / "base")
    ppl.save_base(FEW_TEXTS, tmp_path / "base", **call)
    result = ppl.compare(FEW_TEXTS, base=tmp_path / "base", **call)
    assert result["mean_kl"] == pytest.approx(0, abs=1e-6)
