"""Does a file that was damaged, or forged, give the right number or a sentence, and nothing else?

A seed takes a saved base, a file of --per-text, or a chunk of --per-text of Ray, and changes it:
bytes are flipped, files cut, swapped or deleted, keys and numbers changed. What somebody changes on
purpose gets a checksum that fits, and then only such numbers are changed as cannot be true: whoever
writes other rows of the right shape has written another base. Then `compare` reads the base, or
`save_base` continues it first; `compute` and `compare` of the command continue the file.

    python benchmarks/fuzz_files.py --calls 500 --seed 0     # saved bases; four minutes
    python benchmarks/fuzz_files.py --per-text --calls 500 --seed 0
    python benchmarks/fuzz_files.py --only 17                # one seed, with its traceback

Exit status 1 where a call was wrong or crashed.
"""

import functools
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz_runs import Calls, WrongError, main

# isort: split
import numpy as np
import torch
import transformers
from fuzz_models import CORPUS
from huggingface_hub.utils import disable_progress_bars
from report import ROOT
from safetensors.torch import load_file, save_file

from ppleval import Perplexity
from ppleval.cli import main as command
from ppleval.cli import per_text, per_text_parquet
from ppleval.cli.options import parse
from ppleval.cli.rows import Row
from ppleval.models import saved_base
from ppleval.stats.totals import TextSums

TINY = str(ROOT / "tiny_model")
TEXTS = [*CORPUS, "", "One more."]
# What a key may hold in place of what was written.
ODD = [
    None, True, -1, 0.5, 2**63, 10**18, 10**400, -1e9, "", "many", "1e5", [], {}, [1.0], {"a": 1},
    "\x1b[2J", [[[]]],
]  # fmt: skip


# --- changes of bytes and of JSON ---


def flip_bytes(rng: np.random.Generator, path: Path) -> None:
    """Change one to eight bytes; half of the time near the beginning, where headers are."""
    data = bytearray(path.read_bytes())
    end = min(len(data), 600) if rng.random() < 0.5 else len(data)
    for at in rng.integers(end, size=rng.integers(1, 9)) if end else []:
        data[at] ^= 1 << int(rng.integers(8)) if rng.random() < 0.7 else int(rng.integers(1, 256))
    path.write_bytes(data)


def cut_or_extend(rng: np.random.Generator, path: Path) -> None:
    """A part of the file is gone, zero, there twice, or something follows it."""
    data = path.read_bytes()
    first, last = sorted(rng.integers(len(data) + 1, size=2).tolist())
    changed = [
        data[:first],
        data[:first] + data[last:],
        data[:first] + bytes(last - first) + data[last:],
        data[:last] + data[first:],
        data + data[first:last],
    ][rng.integers(5)]
    path.write_bytes(changed)


def change_json(rng: np.random.Generator, values: dict, odd: list) -> None:
    """Delete, rename or change one key, at any depth."""
    inside = [value for value in values.values() if isinstance(value, dict) and value]
    if inside and rng.random() < 0.5:
        return change_json(rng, inside[rng.integers(len(inside))], odd)
    name = list(values)[rng.integers(len(values))]
    kind = rng.random()
    if kind < 0.2:
        del values[name]
    elif kind < 0.3:
        values[name + "x"] = values.pop(name)
    elif kind < 0.6 and type(values[name]) in (int, float):
        values[name] += [1, -1, 0.25, 1000][rng.integers(4)]
    else:
        values[name] = odd[rng.integers(len(odd))]


def check_same(result: dict, expected: dict, what: str) -> None:
    """Raises WrongError unless all numbers are the same, also nested ones."""
    if result.keys() != expected.keys():
        raise WrongError(f"{what} has other keys")
    for name, value in expected.items():
        found = result[name]
        if isinstance(value, dict):
            check_same(found, value, f"{what}[{name}]")
        elif isinstance(value, int | float):
            close = math.isclose(found, value, rel_tol=1e-5, abs_tol=1e-6)
            if not close and not (math.isnan(found) and math.isnan(value)):
                raise WrongError(f"{what}: {name} is {found}, not {value}")


# --- saved bases ---


@functools.cache
def model_and_tokenizer(seed: int):
    """The bundled model; with a seed, its weights are changed a little."""
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters() if seed else []:
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.02 * noise
    return model, transformers.AutoTokenizer.from_pretrained(TINY)


@functools.cache
def workplace() -> Path:
    """A directory for everything, until the end."""
    folder = tempfile.TemporaryDirectory(prefix="fuzz-files-")
    workplace.folder = folder  # pyright: ignore[reportFunctionMemberAccess]
    return Path(folder.name)


def base_of(kind: str) -> torch.nn.Module:
    """The model of a base; of kind "logits", something stands behind its output layer."""
    model, _ = model_and_tokenizer(1 if kind == "hidden" else 2)
    if kind == "logits" and not model.lm_head._forward_hooks:
        model.lm_head.register_forward_hook(lambda module, args, output: 1.5 * output)
    return model


@functools.cache
def saved(kind: str) -> Path:
    """A whole base, of "hidden" rows or of "logits", in several files."""
    path = workplace() / kind
    _, tokenizer = model_and_tokenizer(0)
    before, saved_base.BYTES_PER_FILE = saved_base.BYTES_PER_FILE, 2**12
    Perplexity().save_base(TEXTS, path, model=base_of(kind), tokenizer=tokenizer)
    saved_base.BYTES_PER_FILE = before
    return path


def compare_with(base: Any) -> dict:
    """The comparison of all texts with a base: a path, or a model."""
    model, tokenizer = model_and_tokenizer(0)
    return Perplexity().compare(TEXTS, model=model, tokenizer=tokenizer, base=base)


@functools.cache
def expected_of(kind: str) -> dict:
    """The comparison with both models in memory."""
    return compare_with(base_of(kind))


def stated_in(path: Path) -> dict:
    """The settings of a base, without their checksum."""
    stated = json.loads((path / saved_base.SETTINGS_FILE).read_text())
    del stated["checksum"]
    return stated


def write_sealed(path: Path, stated: dict) -> None:
    """Write settings, and give them and all other files of the base a checksum that fits."""
    sealed = stated | {"checksum": saved_base._settings_checksum(stated)}
    (path / saved_base.SETTINGS_FILE).write_text(json.dumps(sealed))
    for file in path.glob("*.safetensors"):
        seal(file, load_file(file), stated)


def seal(file: Path, tensors: dict[str, torch.Tensor], stated: dict) -> None:
    """Write tensors under a checksum that fits."""
    checksum = saved_base._checksum(tensors, file.name, stated)
    save_file(tensors, file, {"sha256": checksum})


def change_settings(rng: np.random.Generator, path: Path) -> None:
    """Change a key, with or without the checksum."""
    stated = stated_in(path)
    transform = dict(stated["transform"])
    change_json(rng, stated, ODD)
    if rng.random() < 0.5:
        if isinstance(stated.get("transform"), dict):  # another valid one is that of another base
            stated["transform"] = transform
        write_sealed(path, stated)
    else:
        before = json.loads((path / saved_base.SETTINGS_FILE).read_text())["checksum"]
        (path / saved_base.SETTINGS_FILE).write_text(json.dumps(stated | {"checksum": before}))


def change_number(rng: np.random.Generator, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with one number changed, or two that keep their sum."""
    flat = tensor.flatten().clone()
    if not len(flat):
        return tensor
    at, other = rng.integers(len(flat), size=2)
    by = int(rng.choice([-1000, -1, 1, 7, 2**40])) if flat.dtype == torch.int64 else 0.5
    flat[at] += by
    if rng.random() < 0.5:
        flat[other] -= by
    return flat.view(tensor.shape)


def change_tensors(rng: np.random.Generator, path: Path) -> None:
    """Change a tensor of a file, its shape, its dtype or its name, with or without the checksum."""
    files = sorted(path.glob("*.safetensors"))
    file = files[rng.integers(len(files))]
    tensors, forged = load_file(file), rng.random() < 0.6
    name = list(tensors)[rng.integers(len(tensors))]
    tensor = tensors[name]
    kind = rng.integers(7)
    is_number = tensor.dtype == torch.int64 or not forged  # forged rows are another base
    if kind <= 2 and is_number:
        tensors[name] = change_number(rng, tensor)
    elif kind <= 3:
        tensors[name] = tensor.to([torch.int32, torch.int8, torch.complex64][rng.integers(3)])
    elif kind == 4:
        tensors[name] = [tensor[1:], torch.cat([tensor, tensor]), tensor[None], tensor.flatten()][
            rng.integers(4)
        ]
    elif kind == 5:
        del tensors[name]
    else:
        tensors[name + "x"] = tensors.pop(name)
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    if forged:
        seal(file, tensors, stated_in(path))
    else:
        with saved_base.safe_open(file, framework="pt") as open_file:
            metadata = open_file.metadata()
        save_file(tensors, file, metadata)


def change_files(rng: np.random.Generator, path: Path) -> None:
    """Delete or swap files, or put one of the other base in place of one."""
    files = sorted(path.iterdir())
    one, other = (files[i] for i in rng.integers(len(files), size=2))
    kind = rng.integers(4)
    if kind == 0:
        one.unlink()
    elif kind == 1:
        swapped = one.read_bytes(), other.read_bytes()
        other.write_bytes(swapped[0])
        one.write_bytes(swapped[1])
    elif kind == 2:
        others = sorted(saved("logits" if path.name == "hidden" else "hidden").iterdir())
        shutil.copy(others[rng.integers(len(others))], one)
    else:
        one.unlink()
        [one.mkdir, lambda: os.mkfifo(one), lambda: one.symlink_to("nowhere")][rng.integers(3)]()


def change_base(rng: np.random.Generator, path: Path) -> None:
    """Change one thing."""
    files = sorted(path.iterdir())
    one = files[rng.integers(len(files))]
    change: Callable[[], None] = [
        functools.partial(flip_bytes, rng, one),
        functools.partial(cut_or_extend, rng, one),
        functools.partial(change_settings, rng, path),
        functools.partial(change_tensors, rng, path),
        functools.partial(change_files, rng, path),
    ][rng.choice(5, p=[0.3, 0.1, 0.2, 0.3, 0.1])]
    change()


def one_base(seed: int, calls: Calls) -> bool:
    """Change a base and read it; whether the comparison was answered."""
    rng = np.random.default_rng(seed)
    kind = str(rng.choice(["hidden", "logits"]))
    original, expected = saved(kind), expected_of(kind)
    with tempfile.TemporaryDirectory(dir=workplace()) as folder:
        path = Path(folder, kind)
        shutil.copytree(original, path)
        change_base(rng, path)
        if rng.random() < 0.25:
            _, tokenizer = model_and_tokenizer(0)
            save = functools.partial(
                Perplexity().save_base, TEXTS, path, model=base_of(kind), tokenizer=tokenizer
            )
            calls.attempt(save, "save_base of a changed base")
        result = calls.attempt(functools.partial(compare_with, path), "compare with a changed base")
    if result is None:
        return False
    check_same(result, expected, "compare")
    return True


# --- files of --per-text ---


@functools.cache
def data() -> Path:
    """The texts as a file, each with a group."""
    path = workplace() / "data.jsonl"
    rows = [{"text": text, "kind": "ab"[i % 2]} for i, text in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_command(kind: str, out: Path, resume: bool) -> dict:
    """The result of the command, which writes `out` or continues it."""
    arguments = [str(data()), "--model", TINY, "--per-text", str(out), "--column", "text"]
    if kind == "compare":
        arguments = ["compare", *arguments, "--base", str(saved("hidden"))]
    else:
        arguments = ["compute", *arguments, "--group-by", "kind", "--positions"]
    arguments += ["--resume"] if resume else []
    result = command.run(parse(arguments))
    assert result is not None  # of one process
    return result


@functools.cache
def written(kind: str) -> tuple[bytes, dict]:
    """(the file of a whole run, its result)."""
    out = workplace() / f"{kind}.jsonl"
    result = run_command(kind, out, resume=False)
    return out.read_bytes(), result


def impossible(row: dict, name: str) -> list:
    """What no text has under a name of a line."""
    if name in ("num_tokens", "num_bytes", "num_words"):
        return [-1, 2**63, 10**400, 0.5, "3", None, True, [], {}]
    if name == "weight_sum":
        return ["inf", "nan", -1.0, 5, None, True, "1", []]
    if name in ("nll_sum", "unweighted_nll_sum", "token_nll_sq_sum"):
        return [-1e9, "-inf", 5, None, True, "many", " 1_0.0", [], {}]
    if name in ("truncated", "context_truncated"):
        return [0, 1, None, "yes", []]
    if name in ("kl", "delta_p", "positions"):
        return [[*row[name], -1e9], [[-1.0]], [["a"]], [None], None, 5.0, {}, [[[0.5]]]]
    return [None, -5, [], {}, "other"] if name in ("fingerprint", "group") else []


def change_line(rng: np.random.Generator, line: bytes) -> bytes:
    """The line with one key changed, with or without the checksum."""
    row = json.loads(line)
    if "signature" in row or rng.random() < 0.5:
        change_json(rng, row, ODD)
        return json.dumps(row).encode()
    del row["checksum"]
    inside = row["base"] if "base" in row and rng.random() < 0.3 else row
    name = list(inside)[rng.integers(len(inside))]
    odd = impossible(inside, name)
    if rng.random() < 0.2 and odd:
        del inside[name]
    elif odd:
        inside[name] = odd[rng.integers(len(odd))]
    return json.dumps(row | {"checksum": per_text._checksum(row)}).encode()


def change_lines(rng: np.random.Generator, path: Path) -> None:
    """Change, swap, repeat or delete a line."""
    lines = path.read_bytes().splitlines(keepends=True)
    one, other = rng.integers(len(lines), size=2)
    kind = rng.random()
    if kind < 0.7:
        lines[one] = change_line(rng, lines[one]) + b"\n"
    elif kind < 0.8:
        lines[one], lines[other] = lines[other], lines[one]
    elif kind < 0.9:
        lines.insert(other, lines[one])
    else:
        del lines[one]
    path.write_bytes(b"".join(lines))


def one_file(seed: int, calls: Calls) -> bool:
    """Change a file of --per-text and continue it; whether that was answered."""
    rng = np.random.default_rng(seed)
    if rng.random() < 0.2:
        return one_chunk(rng, calls)
    kind = str(rng.choice(["compute", "compare"]))
    whole, expected = written(kind)
    with tempfile.TemporaryDirectory(dir=workplace()) as folder:
        path = Path(folder, "scores.jsonl")
        path.write_bytes(whole)
        [flip_bytes, cut_or_extend, change_lines][rng.choice(3, p=[0.3, 0.1, 0.6])](rng, path)
        call = functools.partial(run_command, kind, path, resume=True)
        result = calls.attempt(call, f"{kind} --resume of a changed file")
    if result is None:
        return False
    check_same(result, expected, kind)
    return True


def one_chunk(rng: np.random.Generator, calls: Calls) -> bool:
    """Change a chunk of --per-text of Ray and read it; whether that was answered."""
    rows = [Row(text) for text in TEXTS]
    positions = np.array([[1.5, 2.0, 2.0]])
    sums = [
        TextSums(1.5 + i, 2.0, 1.5 + i, 2.5, 2, 10 + i, 3, False, True, positions)
        for i in range(len(TEXTS))
    ]
    with tempfile.TemporaryDirectory(dir=workplace()) as folder:
        output = per_text_parquet.PerTextDirectory(folder)
        output.write("data.jsonl", 0, rows, sums)
        (path,) = Path(folder).iterdir()
        [flip_bytes, cut_or_extend][rng.choice(2, p=[0.8, 0.2])](rng, path)
        call = functools.partial(output.read, "data.jsonl", 0, rows, TextSums)
        found = calls.attempt(call, "a changed chunk")
    if found is None:
        return False
    if list(map(str, found)) != list(map(str, sums)):
        raise WrongError(f"a changed chunk gives {found}")
    return True


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    fuzz = one_file if "--per-text" in sys.argv else one_base
    sys.argv = [argument for argument in sys.argv if argument != "--per-text"]
    main(fuzz, __doc__.splitlines()[0])
