"""A base on disk: the same comparison as with both models in memory, also after a kill."""

import json
import os
import re
import tempfile

import pytest
import torch
from command_line import command_of
from safetensors.torch import load_file, save_file
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


LAYER, TEXT_FILE = "output_layer.safetensors", "texts-000000000.safetensors"


@pytest.fixture
def saved(ppl, pair, tmp_path):
    """(a function that compares with a saved base, its path)."""
    names, base = pair
    path = tmp_path / "base"
    ppl.save_base(TEXTS, path, model=base, tokenizer=names["tokenizer"])
    return lambda: ppl.compare(TEXTS, base=path, **names), path


@pytest.mark.parametrize("name", [LAYER, TEXT_FILE])
@pytest.mark.parametrize("how", ["cut", "gone", "other", "pipe"])
def test_torn_files_are_refused(saved, name, how):
    compare, path = saved
    file = path / name
    data = file.read_bytes()
    file.unlink()
    if how == "pipe":
        os.mkfifo(file)
    elif how != "gone":
        file.write_bytes(data[: len(data) // 2] if how == "cut" else b"something else")
    reason = f"{name} is no whole file of tensors"
    if how in ("gone", "pipe"):
        reason = f"{name} is missing, or no regular file"
    if (how, name) == ("gone", TEXT_FILE):
        reason = "a part of its texts is missing, from number 0 on"
    whole = f"base is a damaged base: {reason}. Delete it, and save it again."
    with pytest.raises(ValueError, match=re.escape(whole)):
        compare()


@pytest.mark.parametrize("name", [LAYER, TEXT_FILE])
def test_a_number_that_changed_does_not_fit_the_checksum(saved, name):
    """The last byte is of a row, or of the output layer."""
    compare, path = saved
    data = bytearray((path / name).read_bytes())
    data[-1] ^= 1
    (path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name} does not fit its checksum. Delete it, and save"):
        compare()


def test_settings_that_changed_do_not_fit_the_checksum(saved):
    compare, path = saved
    stated = (path / "base.json").read_text()
    assert '"logit_scale": 1.0' in stated
    (path / "base.json").write_text(stated.replace('"logit_scale": 1.0', '"logit_scale": 1.5'))
    with pytest.raises(ValueError, match="base.json does not fit its checksum"):
        compare()


def test_a_file_of_another_base_is_refused(saved, ppl, pair, tmp_path):
    """Of the same texts, with the same tokenizer."""
    compare, path = saved
    names, _ = pair
    ppl.save_base(TEXTS, tmp_path / "other", **names)
    for name in (LAYER, TEXT_FILE):
        own = (path / name).read_bytes()
        (path / name).write_bytes((tmp_path / "other" / name).read_bytes())
        with pytest.raises(ValueError, match=f"{name} does not fit its checksum"):
            compare()
        (path / name).write_bytes(own)
    compare()


def test_a_base_of_an_older_version_is_refused(saved):
    compare, path = saved
    stated = json.loads((path / "base.json").read_text())
    (path / "base.json").write_text(json.dumps(stated | {"format": "perplexity base 1"}))
    with pytest.raises(ValueError, match="by another version of this library, .* save it again"):
        compare()


def stated_in(path) -> dict:
    stated = json.loads((path / "base.json").read_text())
    del stated["checksum"]
    return stated


# A setting -> what else it holds, under a checksum that fits.
ODD_SETTINGS = {
    "kind": ["other", None, ["hidden"]],
    "vocab_size": [0, -1, 2.0, "9", True, 10**400, None],
    "num_texts": [0, -3, 1.5, "7", 10**19],
    "model": [None, [], {}, {"model": 5}, {"model": "a", "model\n\x1b[2J": "b"}],
    "reading": [None, [], {}, {"window": None}, {"window": 0}, {"window": [1]}],
    "transform": [
        None, {}, {"logit_scale": 0, "softcap": None}, {"logit_scale": 1, "softcap": 10**400},
        {"logit_scale": "1", "softcap": None}, {"logit_scale": 1, "softcap": None, "more": 1},
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", ODD_SETTINGS)
def test_odd_settings_are_refused(saved, name):
    compare, path = saved
    stated = stated_in(path)
    for odd in ODD_SETTINGS[name]:
        changed = stated | {name: odd}
        sealed = changed | {"checksum": saved_base._settings_checksum(changed)}
        (path / "base.json").write_text(json.dumps(sealed))
        with pytest.raises(ValueError, match=f"base: base.json has no valid {name}. Delete it"):
            compare()
    del stated[name]
    sealed = stated | {"checksum": saved_base._settings_checksum(stated)}
    (path / "base.json").write_text(json.dumps(sealed))
    with pytest.raises(ValueError, match=f"base: base.json has no valid {name}. Delete it"):
        compare()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": []}', '{"a": %s}' % ("9" * 5000), ""])
def test_settings_that_are_no_settings(saved, text):
    compare, path = saved
    (path / "base.json").write_text(text)
    with pytest.raises(ValueError, match="no saved base, or a damaged one: base.json there does"):
        compare()


def with_counts_moved(tensors: dict) -> None:
    tensors["counts"][0] -= 1
    tensors["counts"][1] += 1


def with_a_count_below_zero(tensors: dict) -> None:
    tensors["counts"][0] += 1 + tensors["counts"][1]
    tensors["counts"][1] = -1


# What is wrong -> (the file, the change of its tensors, what is said).
ODD_TENSORS = {
    "counts moved": (TEXT_FILE, with_counts_moved, "holds other tokens for text 0 than it has"),
    "negative count": (TEXT_FILE, with_a_count_below_zero, "do not add up to its rows"),
    "huge count": (TEXT_FILE, lambda t: t["counts"].fill_(2**62), "do not add up to its rows"),
    "ids zeroed": (TEXT_FILE, lambda t: t["ids"].zero_(), "holds other tokens for text 0"),
    "places": (TEXT_FILE, lambda t: t["scored"].add_(1), "holds other tokens for text 0"),
    "integers": (
        TEXT_FILE, lambda t: t.update(rows=t["rows"].int()), "the rows .* floating-point",
    ),
    "narrow rows": (
        TEXT_FILE, lambda t: t.update(rows=t["rows"][:, :5]), "must hold a row of 32 numbers",
    ),
    "fewer rows": (TEXT_FILE, lambda t: t.update(rows=t["rows"][1:]), "must hold a row of 32"),
    "a number for a row": (TEXT_FILE, lambda t: t.update(rows=t["rows"][:, 0]), "must hold a row"),
    "one count": (TEXT_FILE, lambda t: t.update(counts=t["counts"].sum()), "must hold a row"),
    "no texts": (
        TEXT_FILE, lambda t: t.update({name: t[name][:0] for name in t}), "must hold a row",
    ),
    "32 bits": (TEXT_FILE, lambda t: t.update(ids=t["ids"].int()), "integers of 64 bits"),
    "no ids": (TEXT_FILE, lambda t: t.pop("ids"), "must hold counts, fingerprints, ids, rows"),
    "more": (TEXT_FILE, lambda t: t.update(more=t["ids"] + 1), "must hold counts, fingerprints"),
    "small vocabulary": (
        LAYER, lambda t: t.update(weight=t["weight"][1:]), "a vocabulary of 3072 ids",
    ),
    "no weight": (LAYER, lambda t: t.update(bias=t.pop("weight")), "a vocabulary of 3072 ids"),
    "flat weight": (LAYER, lambda t: t.update(weight=t["weight"][:, 0]), "a vocabulary of 3072"),
    "odd bias": (LAYER, lambda t: t.update(bias=t["weight"][:5, 0] + 1), "a vocabulary of 3072"),
    "other tensors": (LAYER, lambda t: t.update(more=t["weight"] + 1), "a vocabulary of 3072"),
    "integer weight": (LAYER, lambda t: t.update(weight=t["weight"].int()), "floating-point"),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD_TENSORS)
def test_odd_tensors_are_refused(saved, case):
    """Under a checksum that fits."""
    compare, path = saved
    name, change, message = ODD_TENSORS[case]
    tensors = load_file(path / name)
    change(tensors)
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    checksum = saved_base._checksum(tensors, name, stated_in(path))
    save_file(tensors, path / name, {"sha256": checksum})
    with pytest.raises(ValueError, match=f"base is a damaged base: .*{message}.*save it again"):
        compare()


def test_another_vocabulary_is_refused(saved):
    compare, path = saved
    stated = stated_in(path) | {"vocab_size": 10**18}
    sealed = stated | {"checksum": saved_base._settings_checksum(stated)}
    (path / "base.json").write_text(json.dumps(sealed))
    tensors = load_file(path / LAYER)
    checksum = saved_base._checksum(tensors, LAYER, stated)
    save_file(tensors, path / LAYER, {"sha256": checksum})
    with pytest.raises(ValueError, match="a vocabulary of 1000000000000000000 ids"):
        compare()


def test_planted_links_are_not_followed(ppl, pair, tmp_path):
    """Neither those of names that a file might be written to first, nor those of left directories;
    and a directory of the user stays."""
    names, base = pair
    path, victim, diary = tmp_path / "base", tmp_path / "victim", tmp_path / "base/unfinished-diary"
    texts = TEXTS * 50  # more than the first portion
    with pytest.raises(RuntimeError):
        ppl.save_base(failing(texts), path, model=base, tokenizer=names["tokenizer"])
    victim.mkdir()
    (victim / "letter").write_text("dear friend")
    diary.mkdir()
    for name in ("base.json", LAYER, TEXT_FILE):
        for suffix in (".part", ".tmp", "~"):
            (path / f"{name}{suffix}").symlink_to(victim / "letter")
    (path / LAYER).unlink()
    (path / LAYER).symlink_to(victim / "new")
    (path / "unfinished-abcdefgh").symlink_to(victim)
    ppl.save_base(texts, path, model=base, tokenizer=names["tokenizer"])
    assert [file.name for file in victim.iterdir()] == ["letter"]
    assert (victim / "letter").read_text() == "dear friend"
    assert diary.is_dir()
    assert not (path / LAYER).is_symlink()


@pytest.mark.filterwarnings("ignore:.*have no token to score:UserWarning")
def test_a_base_of_an_empty_text(ppl, pair, tmp_path):
    names, base = pair
    path = tmp_path / "base"
    ppl.save_base([""], path, add_start_token=False, model=base, tokenizer=names["tokenizer"])
    found = ppl.compare([""], base=path, add_start_token=False, **names)
    assert (found["num_tokens"], found["num_sequences"]) == (0, 0)


def failing(texts):
    yield from texts
    raise RuntimeError
