"""The arguments that name a model, how it is loaded, the one that is kept."""

import concurrent.futures
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from command_line import run
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


class Planted:
    """Writes a file where it is unpickled."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return open, (self.place, "w")


def damaged(directory, kind):
    """A copy of the bundled model that is damaged or hostile in a way of DAMAGES."""
    shutil.copytree(TINY, directory)
    weights, config = directory / "model.safetensors", directory / "config.json"
    rules = directory / "tokenizer.json"
    if kind == "pickle":
        weights.unlink()
        planted = Planted(str(directory / "planted"))
        (directory / "pytorch_model.bin").write_bytes(pickle.dumps(planted, protocol=2))
    elif kind == "zip of a pickle":
        weights.unlink()
        torch.save({"a": Planted(str(directory / "planted"))}, directory / "pytorch_model.bin")
    elif kind == "empty .bin":
        weights.unlink()
        (directory / "pytorch_model.bin").touch()
    elif kind == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "empty weights":
        weights.write_bytes(b"")
    elif kind == "deep config":
        config.write_text("[" * 100_000)
    elif kind == "deep index":
        (directory / "model.safetensors.index.json").write_text("[" * 100_000)
        weights.unlink()
    elif kind == "list as config":
        config.write_text("[]")
    elif kind == "list as index":
        (directory / "model.safetensors.index.json").write_text("[]")
        weights.unlink()
    elif kind == "no heads":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"num_attention_heads": 0}))
    else:
        parts = {
            "panic": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
            "late panic": {"normalizer": {"type": "Precompiled",
                                          "precompiled_charsmap": "BAAAAP////8="}},
            "no unknown": {"model": {"type": "Unigram", "unk_id": None, "vocab": []}},
        }  # fmt: skip
        rules.write_text(json.dumps(json.loads(rules.read_text()) | parts[kind]))
    return directory


DAMAGES = {
    "pickle": "damaged, or a pickle that would run code, which is never done; use one that was",
    "zip of a pickle": "a pickle that would run code",
    "empty .bin": "a file of its weights is empty, or was not copied whole",
    "cut weights": "a file of its weights is damaged, or was not copied whole",
    "empty weights": "a file of its weights is damaged",
    "deep config": "a JSON file of it is nested too deeply",
    "deep index": "a JSON file of it is nested too deeply",
    "list as config": "could not be loaded as a causal language model",
    "list as index": "could not be loaded as a causal language model",
    "no heads": "could not be loaded as a causal language model",
    "panic": "The tokenizer fails, its files may be damaged: Precompiled",
    "late panic": "The tokenizer fails, its files may be damaged: index out of bounds",
    "no unknown": "The tokenizer fails, its files may be damaged: Encountered an unknown token",
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_model_ends_in_a_sentence(tmp_path, kind):
    model = damaged(tmp_path / "model", kind)
    done = run("--model", model, stdin="a text")
    assert done.returncode == 1
    *_, line = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert DAMAGES[kind] in line
    assert not Path(model, "planted").exists()


def test_the_token_of_a_models_address_is_not_shown(ppl):
    with pytest.raises(ValueError, match=r"https://\*\*\*@huggingface.co/a/b") as error:
        ppl.compute(predictions=TEXTS, model_id="https://me:hf_secret@huggingface.co/a/b")
    assert "hf_secret" not in str(error.value)
