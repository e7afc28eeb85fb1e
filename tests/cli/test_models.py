"""The options that place a model, and round its weights, as users call them."""

import json

import pytest
from command_line import TINY, words_of
from support import ROOT, environments
from workers import rank as rank_worker

from ppleval import Perplexity
from ppleval.cli.main import main
from ppleval.cli.models import QUANTIZATIONS, model_options, placing_kwargs
from ppleval.cli.options import build_parser

HELD_OUT = str(ROOT / "tiny_model" / "held_out.jsonl")
COMMAND = ["-m", "ppleval"]


def run(capsys, *arguments) -> tuple[int, str, str]:
    """(exit status, standard output, standard error)"""
    status = main(words_of(*arguments))
    return status, *capsys.readouterr()


@pytest.mark.parametrize("base", [[], ["--base", TINY]], ids=["alone", "compared"])
def test_two_ranks_share_one_model(tmp_path, base):
    data = tmp_path / "data.jsonl"
    texts = ["Return the number of items in the list.", "No.", "The cat. " * 80]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = [*COMMAND, *words_of("--tensor-parallel", 2, "--json", data, *base)]
    (status, printed, error), (other_status, other, _) = rank_worker.finish(
        command, environments(2), timeout=60
    )
    assert (status, other_status, other) == (0, 0, ""), error
    found = json.loads(printed)
    whole = Perplexity().compute(predictions=texts, model_id=TINY)
    assert found["perplexity"] == pytest.approx(whole["perplexity"], rel=2e-6)
    assert found["num_tokens"] == whole["num_tokens"]
    if base:
        assert found["mean_kl"] == pytest.approx(0, abs=1e-9)


def test_a_device_map_places_the_model(capsys):
    status, printed, error = run(capsys, "--device-map", "auto", "--json", "--limit", 3, HELD_OUT)
    assert status == 0, error
    _, alone, _ = run(capsys, "--json", "--limit", 3, HELD_OUT)
    assert json.loads(printed)["perplexity"] == json.loads(alone)["perplexity"]


def test_what_does_not_go_together(capsys):
    with pytest.raises(SystemExit):
        run(capsys, "--tensor-parallel", 2, "--device", "cpu", HELD_OUT)
    assert "--tensor-parallel goes without --device" in capsys.readouterr().err
    for arguments in (["--device", "cpu"], ["--tensor-parallel", "2"]):
        with pytest.raises(SystemExit):
            run(capsys, "--device-map", "auto", *arguments, HELD_OUT)
        assert "--device-map goes without --device" in capsys.readouterr().err
    status, _, error = run(capsys, "--tensor-parallel", 2, HELD_OUT)
    assert status == 1
    assert error.startswith("error: --tensor-parallel 2 needs a number of processes that it div")
    assert "torchrun --nproc-per-node 2 -m ppleval" in error
    with pytest.raises(SystemExit):
        run(capsys, "--tensor-parallel", 0, HELD_OUT)
    assert "--tensor-parallel must be at least 1, got 0" in capsys.readouterr().err


def test_a_device_map_goes_with_one_process():
    for status, _, error in rank_worker.finish(
        [*COMMAND, *words_of("--device-map", "auto", HELD_OUT)], environments(2), timeout=60
    ):
        assert status == 1
        assert "error: --device-map gives one process all cards; here are 2 processes." in error


@pytest.mark.parametrize("package", ["bitsandbytes", "torchao"])
def test_the_package_of_a_quantisation_is_named(capsys, monkeypatch, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    name = {"bitsandbytes": "bnb-4bit", "torchao": "torchao-int8"}[package]
    status, _, error = run(capsys, "--quantization", name, HELD_OUT)
    assert status == 1
    assert error == f"error: --quantization {name} needs {package}: pip install {package}\n"


@pytest.mark.parametrize(
    ("given", "device_map"),
    [
        ([], {"": "cpu"}),
        (["--device", "cuda:1"], {"": "cuda:1"}),
        (["--device-map", "auto"], "auto"),
        (["--tensor-parallel", "2"], None),
    ],
)
def test_where_a_quantised_model_is(monkeypatch, given, device_map):
    """transformers does not move it, and would leave one of torchao on the CPU."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr("ppleval.cli.models._quantization", lambda name, dtype: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    args = build_parser().parse_args(words_of("--quantization", "torchao-int8", *given))
    kwargs = model_options(args, placing_kwargs(args, 2 if device_map is None else 1))
    assert kwargs["model_kwargs"].get("device_map") == device_map


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_a_quantised_model_is_near_the_model(capsys, name):
    package = QUANTIZATIONS[name]
    pytest.importorskip(package)
    options = ["--json", "--limit", 5, HELD_OUT]
    status, printed, error = run(capsys, "--quantization", name, "--base", TINY, *options)
    assert status == 0, error
    found = json.loads(printed)
    assert (
        f"quantization:{'torchao' if 'torchao' in name else 'bitsandbytes'}" in found["signature"]
    )
    assert 0 < found["mean_kl"] < 0.05
