"""A base on disk: the same comparison as with both models in memory, also after a kill."""

import json
import os
import tempfile

import pytest
import torch
from command_line import command_of
from support import ROOT, kill_when
from text_oracles import TEXTS, TINY, variant

from ppleval.models import saved_base

FILES = "texts-*.safetensors"


@pytest.fixture
def pair(models):
    """(the arguments that name a model, a base)."""
    model, tokenizer = models["llama"]
    return {"model": model, "tokenizer": tokenizer}, variant(model, seed=7)


def assert_same(result, expected):
    for name, value in expected.items():
        if name != "signature":
            assert result[name] == pytest.approx(value, rel=1e-6, abs=1e-6, nan_ok=True), name
    assert set(result) == set(expected)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma"])
def test_equals_both_models_in_memory(ppl, models, tmp_path, name):
    model, tokenizer = models[name]
    base = variant(model, seed=7)
    ppl.save_base(TEXTS, tmp_path / "base", model=base, tokenizer=tokenizer)
    names = {"model": model, "tokenizer": tokenizer}
    expected = ppl.compare(TEXTS, base=base, **names)
    result = ppl.compare(TEXTS, base=tmp_path / "base", **names)
    assert_same(result, expected)
    assert result["signature"] == expected["signature"]
    one_by_one = ppl.compare(TEXTS, base=str(tmp_path / "base"), batch_size=1, **names)
    assert_same(one_by_one, expected)


def test_fewer_texts_than_were_saved_are_refused(ppl, pair, tmp_path):
    names, base = pair
    ppl.save_base(TEXTS, tmp_path / "base", model=base, tokenizer=names["tokenizer"])
    match = f"has {len(TEXTS)} texts, and 3 were compared with it. Pass the same texts, or save"
    with pytest.raises(ValueError, match=match):
        ppl.compare(TEXTS[:3], base=tmp_path / "base", **names)
    # What is shown text by text stands for no corpus.
    assert len(ppl.compare_tokens(TEXTS[:3], base=tmp_path / "base", **names)) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_size_per_token(ppl, models, tmp_path, dtype):
    """hidden_size numbers in the model's dtype, and two numbers of 8 bytes."""
    model, tokenizer = models["llama"]
    base = variant(model, seed=7).to(dtype)
    ppl.save_base(TEXTS * 20, tmp_path / "base", model=base, tokenizer=tokenizer)
    num_tokens = ppl.compute(predictions=TEXTS * 20, model=base, tokenizer=tokenizer)["num_tokens"]
    size = sum(path.stat().st_size for path in (tmp_path / "base").glob(FILES))
    per_token = model.config.hidden_size * dtype.itemsize + 16
    assert per_token <= size / num_tokens < 1.25 * per_token
    layer = (tmp_path / "base" / "output_layer.safetensors").stat().st_size
    weight = base.lm_head.weight
    assert layer == pytest.approx(weight.numel() * dtype.itemsize, rel=0.01)


def test_logits_are_kept_where_the_output_layer_cannot_be(ppl, pair, tmp_path):
    names, base = pair
    base.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    ppl.save_base(TEXTS, tmp_path / "base", model=base, tokenizer=names["tokenizer"])
    stated = json.loads((tmp_path / "base" / "base.json").read_text())
    assert stated["kind"] == "logits"
    assert not (tmp_path / "base" / "output_layer.safetensors").exists()
    result = ppl.compare(TEXTS, base=tmp_path / "base", **names)
    assert_same(result, ppl.compare(TEXTS, base=base, **names))


@pytest.mark.parametrize("options", [{"preset": "llama.cpp", "window": 16}, {"max_length": 9}])
def test_presets_and_settings(ppl, pair, tmp_path, options):
    names, base = pair
    path = tmp_path / "base"
    ppl.save_base(TEXTS, path, model=base, tokenizer=names["tokenizer"], **options)
    result = ppl.compare(TEXTS, base=path, **names, **options)
    assert_same(result, ppl.compare(TEXTS, base=base, **names, **options))


def test_contexts_and_tokens(ppl, pair, tmp_path):
    names, base = pair
    contexts = [f"Number {i}: " for i in range(len(TEXTS))]
    path = tmp_path / "base"
    ppl.save_base(TEXTS, path, model=base, tokenizer=names["tokenizer"], contexts=contexts)
    found = ppl.compare_tokens(TEXTS, base=path, contexts=contexts, **names)
    expected = ppl.compare_tokens(TEXTS, base=base, contexts=contexts, **names)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.kl == pytest.approx(theirs.kl, abs=1e-6)
        assert mine.base_top == theirs.base_top
    with pytest.raises(
        ValueError, match="saved with contexts text, and the texts are now read with"
    ):
        ppl.compare(TEXTS, base=path, **names)


def test_a_save_that_fails_is_continued(ppl, pair, tmp_path):
    names, base = pair
    path, texts = tmp_path / "base", TEXTS * 100

    def some():
        yield from texts[:300]
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="went away"):
        ppl.save_base(some(), path, model=base, tokenizer=names["tokenizer"])
    kept = sorted(path.glob(FILES))
    assert kept
    times = [file.stat().st_mtime_ns for file in kept]
    with pytest.raises(ValueError, match="texts, and there are more. It is not complete"):
        ppl.compare(texts, base=path, **names)
    ppl.save_base(texts, path, model=base, tokenizer=names["tokenizer"])
    assert [file.stat().st_mtime_ns for file in kept] == times
    assert_same(ppl.compare(texts, base=path, **names), ppl.compare(texts, base=base, **names))
    # Once more changes nothing.
    ppl.save_base(texts, path, model=base, tokenizer=names["tokenizer"])
    assert [file.stat().st_mtime_ns for file in kept] == times


@pytest.mark.long
def test_killed_in_the_middle_and_continued(ppl, tmp_path):
    """The command line, by SIGKILL; the comparison then is that with both models in memory."""
    data, path = tmp_path / "data.jsonl", tmp_path / "base"
    source = (ROOT / "tiny_model" / "held_out.jsonl").read_text(encoding="utf-8")
    texts = [json.loads(line)["text"] for line in source.splitlines()]
    pieces = [text[i : i + 900] for text in texts for i in range(0, len(text), 900)] * 2
    data.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    command = command_of(data, "--to", path)
    kill_when(lambda: len(list(path.glob(FILES))) >= 2, command)
    kept = saved_base.SavedBase(path).num_texts
    assert 0 < kept < len(pieces)
    ppl.save_base(pieces, path, model_id=TINY)
    assert saved_base.SavedBase(path).num_texts == len(pieces)
    result = ppl.compare(pieces, model_id=TINY, base=path)
    assert result["mean_kl"] < 1e-7
    assert result["perplexity_ratio"] == pytest.approx(1, abs=1e-7)
    assert result["num_sequences"] == len(pieces)


class Killed(BaseException):
    """The end of a process."""


class LeftBehind:
    """A temporary directory of a process that dies before it cleans up."""

    def __init__(self, prefix, dir):
        self.name = tempfile.mkdtemp(prefix=prefix, dir=dir)

    def __enter__(self):
        return self.name

    def __exit__(self, *error):
        pass


def kill_at(patch, number: int, is_complete: bool) -> None:
    """The process dies while it writes this file, by its number, or directly behind it."""
    places, replace = [], os.replace

    def replace_or_die(part, place):
        places.append(place)
        if len(places) <= number or is_complete:
            replace(part, place)
        if len(places) > number:
            if not is_complete:
                os.truncate(part, os.path.getsize(part) // 2)
            raise Killed

    patch.setattr(os, "replace", replace_or_die)
    patch.setattr(saved_base, "TemporaryDirectory", LeftBehind, raising=False)


@pytest.mark.parametrize("is_complete", [False, True])
@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_killed_at_any_file_and_continued(ppl, pair, tmp_path, monkeypatch, number, is_complete):
    """The settings, the output layer, the texts, the settings of a complete base."""
    names, base = pair
    path, own = tmp_path / "base", {"model": base, "tokenizer": names["tokenizer"]}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, number, is_complete)
        ppl.save_base(TEXTS, path, **own)
    if (number, is_complete) < (2, True):
        with pytest.raises(ValueError, match=r"is no saved base|It is not complete|is not comple"):
            ppl.compare(TEXTS, base=path, **names)
    ppl.save_base(TEXTS, path, **own)
    names_of_files = ["base.json", "output_layer.safetensors", "texts-000000000.safetensors"]
    assert sorted(file.name for file in path.iterdir()) == names_of_files
    assert_same(ppl.compare(TEXTS, base=path, **names), ppl.compare(TEXTS, base=base, **names))


def test_a_directory_that_only_looks_like_a_start_is_kept(ppl, pair, tmp_path):
    names, base = pair
    diary = tmp_path / "unfinished-diary" / "monday.txt"
    diary.parent.mkdir()
    diary.write_text("dear diary")
    with pytest.raises(ValueError, match="exists, and is no saved base"):
        ppl.save_base(TEXTS, tmp_path, model=base, tokenizer=names["tokenizer"])
    assert diary.read_text() == "dear diary"


def test_other_texts_settings_and_models_are_refused(ppl, pair, tmp_path):
    names, base = pair
    own = {"model": base, "tokenizer": names["tokenizer"]}
    path = tmp_path / "base"
    ppl.save_base(TEXTS, path, **own)
    changed = [*TEXTS[:2], "Another one.", *TEXTS[3:]]
    with pytest.raises(ValueError, match="of other texts, or of another tokenizer: text 2 has"):
        ppl.compare(changed, base=path, **names)
    with pytest.raises(ValueError, match="has 7 texts, and there are more. Pass the same texts"):
        ppl.compare([*TEXTS, "more"], base=path, **names)
    with pytest.raises(
        ValueError, match="saved with window 24, and the texts are now read with wi"
    ):
        ppl.compare(TEXTS, base=path, window=12, **names)
    with pytest.raises(ValueError, match="of other texts, or of another tokenizer: text 2 has"):
        ppl.save_base(changed, path, **own)
    with pytest.raises(ValueError, match="a base of another model or of other settings"):
        ppl.save_base(TEXTS, path, **names)
    with pytest.raises(ValueError, match="a base of another model or of other settings"):
        ppl.save_base(TEXTS, path, window=12, **own)
    with pytest.raises(ValueError, match="is of 7 texts, not 6"):
        ppl.save_base(TEXTS[:6], path, **own)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    with pytest.raises(ValueError, match="exists, and is no saved base"):
        ppl.save_base(TEXTS, tmp_path / "notes", **own)
    assert_same(ppl.compare(TEXTS, base=path, **names), ppl.compare(TEXTS, base=base, **names))


@pytest.mark.parametrize("name", ["output_layer", "texts-000000000"])
@pytest.mark.parametrize("how", ["cut", "gone", "other"])
def test_torn_files_are_refused(ppl, pair, tmp_path, name, how):
    names, base = pair
    path = tmp_path / "base"
    ppl.save_base(TEXTS, path, model=base, tokenizer=names["tokenizer"])
    file = path / f"{name}.safetensors"
    data = file.read_bytes()
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(data[: len(data) // 2] if how == "cut" else b"something else")
    match = (
        "missing or torn"
        if name == "output_layer" or how != "gone"
        else "lacks a part of its texts"
    )
    with pytest.raises(ValueError, match=match):
        ppl.compare(TEXTS, base=path, **names)
