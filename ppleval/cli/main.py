"""The command `ppleval`: its arguments -> a result, which is printed -> an exit status.

options.py, which says what it takes -> scoring.py, save_base.py or ray/command.py: a function for
each command -> show/: a table or a picture
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ppleval.cli.messages import tell
from ppleval.cli.options import parse
from ppleval.cli.save_base import save_base
from ppleval.cli.scoring import compare, compute
from ppleval.show import plots
from ppleval.show.tables import as_table, comparison_table
from ppleval.shown import shown_message

if TYPE_CHECKING:
    from ppleval.stats.totals import Result

COMMANDS = {"compute": compute, "compare": compare, "save-base": save_base}


def run(args: argparse.Namespace) -> "Result | None":
    """The result of a command; None where another process has it, or a base was saved."""
    return COMMANDS[args.command](args)


def main(argv: list[str] | None = None) -> int:
    """Run the command line, and return the exit status."""
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        result = run(args)
        if result is not None:
            show(result, args)
    except KeyboardInterrupt:
        hint = "; --resume continues it" if vars(args).get("per_text") is not None else ""
        tell(f"interrupted{hint}")
        return 130
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        tell(f"error: {shown_message(reason_of(error))}")
        return 1
    except MemoryError:
        tell(
            "error: memory ran out. Pass a smaller --batch-size or --window, or --max-text-bytes "
            "to refuse long texts."
        )
        return 1
    return 0


def show(result: "Result", args: argparse.Namespace) -> None:
    """Print the result, and draw it with --plot."""
    if args.json:
        from ppleval.cli.per_text import finite

        print(json.dumps(finite(without_lists(result)), allow_nan=False), flush=True)
    elif args.command == "compare":
        print(comparison_table(result, args.model, args.base), flush=True)
    else:
        print(as_table(result, args.model), flush=True)
    if args.plot is not None:
        draw(result, args.plot)


def draw(result: dict, path: Path) -> None:
    """Write the picture of a result; an error of the disk names the file."""
    try:
        plots.save(result, path)
    except OSError as error:
        error.filename = str(path)
        raise


def without_lists(result: dict) -> dict:
    """The result, and that of each group, without the perplexity of each text."""
    return {
        name: without_lists(value) if isinstance(value, dict) else value
        for name, value in result.items()
        if not isinstance(value, list)
    }


def reason_of(error: Exception) -> str:
    """The sentence of an error; of the system's the reason and the file, without a number."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {str(error.filename)!r}"
    return " ".join(str(error).split())


def run_and_exit() -> None:
    """Run the command line of this process, and end it."""
    status = main()
    # Skip the interpreter's shutdown: threads of pyarrow (huggingface/datasets issue 7566) and gloo
    # (pytorch pull request 179291) sometimes abort in it. Everything is written by now.
    os._exit(status)
