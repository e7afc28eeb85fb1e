"""The command `ppleval`, as tests run it: within this process, or as another one."""

import contextlib
import io
import json
import sys
from types import SimpleNamespace

import pytest
from support import ROOT

from ppleval.cli.main import main

TINY = str(ROOT / "tiny_model")


def words_of(*arguments) -> list[str]:
    """These arguments, with TINY for the model, behind the subcommand that takes them."""
    words = list(map(str, arguments))
    command = "save-base" if "--to" in words else "compare" if "--base" in words else "compute"
    return [command, "--model", TINY, *words]


def command_of(*arguments) -> list[str]:
    """The command of another process."""
    return [sys.executable, "-m", "ppleval", *words_of(*arguments)]


def run(*arguments, stdin: str | bytes = "") -> SimpleNamespace:
    """The command within this process: `returncode`, `stdout`, `stderr`."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.MonkeyPatch.context() as patch,
    ):
        data = stdin.encode() if isinstance(stdin, str) else stdin
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="cp1252"))
        try:
            status = main(words_of(*arguments))
        except SystemExit as stop:
            status = stop.code
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())


def result(*arguments, stdin: str | bytes = "") -> dict:
    """What --json prints."""
    done = run("--json", *arguments, stdin=stdin)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
