"""What a call was given: options that it states win over those with which the metric was made."""

import pytest
import torch
from support import random_batch
from text_oracles import TINY

from ppleval import Perplexity

LOGITS = ("from_logits", "ignore_index", "mask_token_id", "shift", "dtype", "backend")
DEFAULTS = dict(zip(LOGITS, (True, -100, None, False, "float32", "auto"), strict=True))
MADE_WITH = dict(zip(LOGITS, (False, 1, 2, True, "float64", "torch"), strict=True))


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.filterwarnings("ignore")  # probabilities are taken for logits
def test_a_default_that_is_stated_wins(name):
    logits, targets = random_batch()
    batch = {"predictions": logits.softmax(-1), "references": targets}
    stated = Perplexity(**MADE_WITH).compute(**batch, **{name: DEFAULTS[name]})
    assert stated == Perplexity(**MADE_WITH | {name: DEFAULTS[name]}).compute(**batch)
    assert stated != Perplexity(**MADE_WITH).compute(**batch)


@pytest.mark.parametrize(("name", "shown"), [("dtype", "float32"), ("backend", "auto")])
def test_a_default_that_is_stated_wins_for_texts(name, shown):
    made = Perplexity(dtype="float64", backend="torch")
    scorer = made.text_scorer(model_id=TINY, **{name: shown})
    assert f"|{name}:{shown}|" in scorer.signature(False)


@pytest.mark.parametrize("name", ["from_logits", "ignore_index", "mask_token_id", "shift"])
def test_an_option_of_logits_does_not_go_with_texts_at_its_default_either(ppl, name):
    with pytest.raises(ValueError, match=f"{name}= goes with logits"):
        ppl.compute(predictions=["a text"], model_id=TINY, **{name: DEFAULTS[name]})


def test_conversations_are_not_found_where_it_is_stated_that_there_are_none(ppl):
    talks = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]
    with pytest.raises(ValueError, match="chat_template has no meaning with texts"):
        ppl.compute(
            predictions=talks, model_id=TINY, chat_template="{{ messages }}", conversations=False
        )


def test_hooks_take_a_default_that_is_stated():
    logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])
    hooks = Perplexity(from_logits=False).trainer_hooks(from_logits=True)
    rows = hooks["preprocess_logits_for_metrics"](-logits, torch.tensor([[0, 1]]))
    assert torch.isfinite(rows).all()
