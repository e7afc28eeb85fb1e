"""The programs under examples/ print what docs/ says; benchmarks say what they need."""

import functools
import importlib.util
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from support import ROOT

from ppleval import Perplexity

WHY_PAGE = ROOT / "docs" / "why_numbers_differ.md"
PEERS_ARE_INSTALLED = all(map(importlib.util.find_spec, ("lm_eval", "torchmetrics")))


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    return tmp_path_factory.mktemp("examples") / "picture.png"


@pytest.fixture(scope="module")
def printed(picture):
    """What an example prints, by its name; that one with the packages' own numbers where they are
    installed."""
    arguments = {
        "why_numbers_differ": ["--peers"] if PEERS_ARE_INSTALLED else [],
        "perplexity_by_position": [picture],
    }

    @functools.cache
    def run(name):
        done = subprocess.run(
            [sys.executable, ROOT / "examples" / f"{name}.py", *arguments.get(name, [])],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def program_of(name):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


def figures(text: str) -> dict[tuple[str, str], list[float]]:
    """{(model and data, processes): [true perplexity, exp(eval_loss), this module]}"""
    rows = re.findall(r"^\| ((?:GPT-2|Llama), [^|]*) \| (\d) \| (.*) \|$", text, flags=re.MULTILINE)
    return {
        (name, processes): [float(v) for v in rest.split(" | ")] for name, processes, rest in rows
    }


@pytest.mark.long
def test_eval_loss_is_not_perplexity(printed):
    found = figures(printed("eval_loss_is_not_perplexity"))
    stated = figures((ROOT / "docs" / "trainer.md").read_text(encoding="utf-8"))
    assert set(found) == set(stated)
    assert len(found) == 4
    for case, values in found.items():
        assert values == pytest.approx(stated[case], rel=1e-3)
        perplexity, exp_eval_loss, reported = values
        assert reported == pytest.approx(perplexity, rel=2e-5, abs=0.01)
        assert exp_eval_loss != pytest.approx(perplexity, rel=0.05)


@pytest.mark.long
def test_quantisation(printed):
    """docs/compare.md shows what the program prints, to the last digit but one."""

    def rows(text):
        lines = re.findall(r"^\| (\d bits) \| (.*) \|$", text, flags=re.MULTILINE)
        return {name: [float(v) for v in re.findall(r"[\d.]+", rest)] for name, rest in lines}

    found = rows(printed("quantisation"))
    stated = rows((ROOT / "docs" / "compare.md").read_text(encoding="utf-8"))
    assert list(found) == list(stated) == ["8 bits", "6 bits", "4 bits"]
    for name, values in found.items():
        assert values == pytest.approx(stated[name], rel=2e-3, abs=1.1e-4)


NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?"


@pytest.fixture(scope="module")
def why_printed(printed):
    return printed("why_numbers_differ")


def section(text: str, name: str) -> str:
    """What stands between the markers of that name."""
    (found,) = re.findall(rf"<!-- {name} -->\n(.*?)<!-- end of {name} -->", text, flags=re.DOTALL)
    return found


def cells(text: str, name: str) -> list[list[str]]:
    """The rows of the table of a section."""
    lines = [line for line in section(text, name).splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines[2:]]


def stated(name: str) -> str:
    return section(WHY_PAGE.read_text(encoding="utf-8"), name)


def check_same_words_and_numbers(text: str, expected: str) -> None:
    assert re.sub(NUMBER, "#", text) == re.sub(NUMBER, "#", expected)
    for number, other in zip(re.findall(NUMBER, text), re.findall(NUMBER, expected), strict=True):
        last_digit = 10.0 ** -len(number.partition(".")[2])
        found, wanted = (float(n.replace(",", "")) for n in (number, other))
        assert found == pytest.approx(wanted, rel=1e-3, abs=last_digit if "." in number else 0)


@pytest.mark.long
@pytest.mark.parametrize("name", ["conventions", "key"])
def test_why_numbers_differ_is_what_its_program_prints(why_printed, name):
    check_same_words_and_numbers(stated(name), section(why_printed, name))


@pytest.mark.long
@pytest.mark.skipif(not PEERS_ARE_INSTALLED, reason="the extra bench is not installed")
def test_why_numbers_differ_has_the_numbers_of_the_packages(why_printed):
    check_same_words_and_numbers(stated("peers"), section(why_printed, "peers"))


@pytest.mark.long
def test_why_numbers_differ_puts_the_packages_beside_their_rows(why_printed):
    numbers = {row[0]: float(row[1].replace(",", "")) for row in cells(why_printed, "conventions")}
    rows = cells(WHY_PAGE.read_text(encoding="utf-8"), "peers")
    assert len(rows) == 4
    for package, number, row, ours in rows:
        assert float(ours) == pytest.approx(numbers[row], rel=1e-3), package
        assert float(number) == pytest.approx(float(ours), rel=1e-5), package


@pytest.mark.long
def test_the_key_to_strange_numbers_tells_the_units(why_printed):
    """Its rules, by the numbers of the table."""
    numbers = {row[0]: float(row[1].replace(",", "")) for row in cells(why_printed, "conventions")}
    key = {row[1]: row[2] for row in cells(why_printed, "key")}
    log_ours = math.log(numbers["**this module**"])
    for unit, name in (
        ("word perplexity", "`word_perplexity`"),
        ("byte perplexity", "`byte_perplexity`"),
        ("2 to the power of nats", "2 to the power of `mean_nll`"),
    ):
        assert math.log(numbers[name]) / log_ours == pytest.approx(float(key[unit]), rel=1e-3)
    for unit, name in (
        ("the loss, in nats per token", "`mean_nll`"),
        ("bits per token", "`bits_per_token`"),
        ("bits per byte", "`bits_per_byte`"),
    ):
        assert numbers[name] == pytest.approx(float(key[unit]), rel=1e-3)


def test_why_numbers_differ_writes_between_the_markers_only():
    program = program_of("why_numbers_differ")
    page = "above\n<!-- key -->\n<!-- end of key -->\nbelow\n"
    once = program.put(page, "key", r"| \1 |")
    assert once == "above\n<!-- key -->\n| \\1 |\n<!-- end of key -->\nbelow\n"
    assert program.put(once, "key", "| 2 |") == once.replace(r"\1", "2")
    with pytest.raises(ValueError, match="the page needs <!-- peers --> and <!-- end of peers -->"):
        program.put(page, "peers", "")


@pytest.mark.long
def test_ray_corpus(printed):
    """The numbers of one process."""
    program = program_of("ray_corpus")
    texts = [row["text"] for row in program.held_out_texts()]
    groups = [row["domain"] for row in program.held_out_texts()]
    expected = Perplexity().compute(predictions=texts, groups=groups, model_id=str(program.MODEL))
    whole, flush, indented, *_ = re.findall(r"([\d.]+) over (\d+) tokens", printed("ray_corpus"))
    for (perplexity, num_tokens), result in (
        (whole, expected),
        (flush, expected["groups"]["flush"]),
        (indented, expected["groups"]["indented"]),
    ):
        assert float(perplexity) == pytest.approx(result["perplexity"], abs=0.006)
        assert int(num_tokens) == result["num_tokens"]
    assert printed("ray_corpus").count(" nats, ") == 3


def test_perplexity_by_position(printed, picture):
    printed("perplexity_by_position")
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = ROOT / "docs" / "perplexity_by_position.png"
    assert max(picture.stat().st_size, shown.stat().st_size) < 60_000


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens where there is no GPU")
def test_the_benchmark_of_the_gpu_says_that_it_needs_one():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "bench_gpu.py"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "bench_gpu.py needs a CUDA device.\n"
