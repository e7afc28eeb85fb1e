"""The programs under examples/ print what docs/ says; benchmarks say what they need."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT


def figures(text: str) -> dict[tuple[str, str], list[float]]:
    """{(model and data, processes): [true perplexity, exp(eval_loss), this module]}"""
    rows = re.findall(r"^\| ((?:GPT-2|Llama), [^|]*) \| (\d) \| (.*) \|$", text, flags=re.MULTILINE)
    return {
        (name, processes): [float(v) for v in rest.split(" | ")] for name, processes, rest in rows
    }


def test_eval_loss_is_not_perplexity():
    program = ROOT / "examples" / "eval_loss_is_not_perplexity.py"
    done = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, timeout=300, check=True
    )
    printed = figures(done.stdout)
    stated = figures((ROOT / "docs" / "trainer.md").read_text(encoding="utf-8"))
    assert set(printed) == set(stated)
    assert len(printed) == 4
    for case, values in printed.items():
        assert values == pytest.approx(stated[case], rel=1e-3)
        perplexity, exp_eval_loss, reported = values
        assert reported == pytest.approx(perplexity, rel=2e-5, abs=0.01)
        assert exp_eval_loss != pytest.approx(perplexity, rel=0.05)


def test_quantisation():
    """docs/compare.md shows what the program prints, to the last digit but one."""
    program = ROOT / "examples" / "quantisation.py"
    done = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, timeout=300, check=True
    )

    def rows(text):
        lines = re.findall(r"^\| (\d bits) \| (.*) \|$", text, flags=re.MULTILINE)
        return {name: [float(v) for v in re.findall(r"[\d.]+", rest)] for name, rest in lines}

    printed = rows(done.stdout)
    stated = rows((ROOT / "docs" / "compare.md").read_text(encoding="utf-8"))
    assert list(printed) == list(stated) == ["8 bits", "6 bits", "4 bits"]
    for name, values in printed.items():
        assert values == pytest.approx(stated[name], rel=2e-3, abs=1.1e-4)


def test_perplexity_by_position(tmp_path):
    program = ROOT / "examples" / "perplexity_by_position.py"
    picture = tmp_path / "picture.png"
    subprocess.run([sys.executable, program, picture], timeout=300, check=True)
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
