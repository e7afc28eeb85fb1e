"""The arguments that name a model, how it is loaded, the one that is kept."""

import concurrent.futures
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from text_oracles import (
    TEXTS,
    TINY,
    assert_equals,
    expected_result,
)
from transformers import AutoModelForCausalLM, ViTConfig

from ppleval import Perplexity


def test_a_model_is_loaded_once_and_not_pickled(ppl, monkeypatch):
    calls = []
    original = AutoModelForCausalLM.from_pretrained

    def counted(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counted)
    first = ppl.compute(predictions=TEXTS, model_id=TINY)
    second = ppl.compute(predictions=TEXTS, model_id=TINY, stride=100)
    ppl.score(TEXTS, model_id=TINY)
    assert len(calls) == 1
    assert first["num_tokens"] == second["num_tokens"]
    assert len(pickle.dumps(ppl)) < 100_000
    ppl.compute(predictions=TEXTS, model_id=TINY, model_kwargs={"dtype": torch.bfloat16})
    assert len(calls) == 2


def test_model_kwargs_and_device_pass_through(ppl):
    result = ppl.compute(
        predictions=TEXTS,
        model_id=TINY,
        device="cpu",
        model_kwargs={"dtype": torch.bfloat16, "attn_implementation": "eager"},
    )
    assert "|model_dtype:bfloat16|" in result["signature"]
    exact = ppl.compute(predictions=TEXTS, model_id=TINY, device=torch.device("cpu"))
    assert result["perplexity"] == pytest.approx(exact["perplexity"], rel=0.05)
    assert result["perplexity"] != exact["perplexity"]


def test_an_unknown_model_is_named(ppl, tmp_path):
    with pytest.raises(ValueError, match="model_id='nobody/nothing' could not be loaded"):
        ppl.compute(predictions=TEXTS, model_id="nobody/nothing")
    with pytest.raises(ValueError, match="could not be loaded: .* has neither config.json"):
        ppl.compute(predictions=TEXTS, model_id=str(tmp_path))


@pytest.mark.parametrize("name", ["./absent", "a/b/c", "absent/", "{here}/absent"])
def test_a_path_that_does_not_exist(ppl, tmp_path, monkeypatch, name):
    """No name on the Hub looks like these, so nothing is asked of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ppleval.models.loading.AutoConfig.from_pretrained", None)
    name = name.format(here=tmp_path)
    place = tmp_path / name
    with pytest.raises(ValueError, match=f"there is no directory {place}. Pass one that exists"):
        ppl.compute(predictions=TEXTS, model_id=name)
    with pytest.raises(ValueError, match=f"base_id=.* there is no directory {place}. Pass one"):
        ppl.compare(TEXTS, model_id=TINY, base_id=name)


def test_a_home_that_is_not_expanded(ppl):
    with pytest.raises(ValueError, match=f"~ is not expanded here. Pass {Path.home()}/absent."):
        ppl.compute(predictions=TEXTS, model_id="~/absent")


class NotFoundError(HfHubHTTPError):
    """An answer of the Hub."""

    def __init__(self):
        """Without the response."""


@pytest.mark.parametrize("answer", [None, NotFoundError(), TimeoutError("no answer")])
def test_a_name_that_begins_like_a_path_here(ppl, tmp_path, monkeypatch, answer):
    """The Hub is asked once, where transformers would ask and wait for a minute."""
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)

    def model_info(*args, **options):
        if answer is not None:
            raise answer

    monkeypatch.setattr("ppleval.models.places.HfApi.model_info", model_info)
    place = tmp_path / "models/absent"
    said = f"there is no directory {place}, and the Hub, where it might be, does not answer"
    if not isinstance(answer, TimeoutError):  # then transformers tells why it is not there
        said = f"could not be loaded as .*On this machine there is no directory {place}."
    with pytest.raises(ValueError, match=said):
        ppl.compute(predictions=TEXTS, model_id="models/absent")
    kwargs = {"local_files_only": True}
    with pytest.raises(ValueError, match=f"there is no directory {place}, and the Hub"):
        ppl.compute(predictions=TEXTS, model_id="models/absent", model_kwargs=kwargs)


def test_the_whole_reason_is_kept(ppl, tmp_path):
    """That of transformers has several lines, and a list of all its models."""
    model = shutil.copytree(TINY, tmp_path / "model")
    for file in model.glob("token*"):
        file.unlink()
    with pytest.raises(ValueError, match="one of: \\(1\\) .* It has no tokenizer: save one there"):
        ppl.compute(predictions=TEXTS, model_id=model)
    shutil.copytree(TINY, tmp_path / "vision")
    ViTConfig().save_pretrained(tmp_path / "vision")
    with pytest.raises(ValueError, match="should be one of .*, and [0-9]+ more") as error:
        ppl.compute(predictions=TEXTS, model_id=tmp_path / "vision")
    assert len(str(error.value)) < 700


def test_one_model_in_several_threads(models):
    model, tokenizer = models["llama"]
    expected = expected_result(model, tokenizer, TEXTS)

    def compute(_):
        return Perplexity().compute(predictions=TEXTS, model=model, tokenizer=tokenizer)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for result in pool.map(compute, range(24)):
            assert_equals(result, expected)
