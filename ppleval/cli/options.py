"""What the command takes: its options, and the rules between them. Nothing is read here.

Each command has options of its own (`commands.choices`), and `RULES` has what does not go together.
"""

import argparse
import difflib
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ppleval import __version__
from ppleval.cli import models as cli_models
from ppleval.cli.rows import MAX_TEXT_BYTES
from ppleval.shown import shown_message

DESCRIPTION = """\
The command `ppleval`: the perplexity of files under a model, and how far it is from another.

    ppleval compute --model tiny_model book.txt
    ppleval compute --model tiny_model --column text data.jsonl --per-text scores.jsonl
    ppleval compute --model ./chat-model --column messages talks.jsonl
    ppleval compute --model tiny_model --dataset allenai/c4:en:validation --limit 1000
    ppleval compare --base meta-llama/Llama-3.1-8B --model ./llama-int4 data.jsonl
    ppleval save-base --model meta-llama/Llama-3.1-8B --to base data.jsonl
    accelerate launch -m ppleval compute --model tiny_model --column text data.jsonl
    ppleval compute --engine ray --model tiny_model data/*.parquet --per-text out/

A plain file is one text, in UTF-8. With --lines each line is one; only \\n and \\r\\n end a line.
A table holds one text per row, in --column: .csv, .tsv, .json, .parquet, and JSON Lines as .jsonl,
.jsonlines, .jl, .ndjson or .ldjson. All but .parquet may be compressed: .gz, .bz2, .xz, .lzma,
.zst. A column of JSON or Parquet may also hold conversations, lists of messages. Standard input (no
files, or -) is read as a plain file. --dataset streams what `load_dataset` reads, on the Hub or in
a directory, or what `save_to_disk` wrote, instead of files: NAME:PART is the configuration PART if
there is one, else the split PART. The processes of torchrun or `accelerate launch` share the texts;
so do the workers of a Ray cluster (--engine ray), which may die. Exit status: 0 done, 1 failed (one
line says why), 2 wrong usage, 130 interrupted.
"""


class Parser(argparse.ArgumentParser):
    """A parser whose errors show arguments, which may be names of files, as all others do."""

    def error(self, message: str) -> NoReturn:
        super().error(shown_message(message))


def build_parser() -> argparse.ArgumentParser:
    """The parser of the commands, each with its options in the order of --help."""
    parser = Parser(
        prog="ppleval",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ppleval {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    add_compute(commands.add_parser("compute", help="the perplexity of texts under a model"))
    add_compare(
        commands.add_parser("compare", help="how far a model is from a base on the same texts")
    )
    add_save_base(commands.add_parser("save-base", help="write a base for compare, which reads it"))
    parser.set_defaults(commands=commands.choices)  # name -> parser, for errors
    return parser


def add_compute(parser: argparse.ArgumentParser) -> None:
    """The options of `ppleval compute`."""
    add_names(parser)
    add_texts(parser)
    scoring = add_scoring(parser)
    scoring.add_argument(
        "--pseudo", metavar="KIND", help="of a masked model: original or within_word_l2r [none]"
    )
    add_model(parser)
    add_ray(parser)
    add_output(parser)


def add_compare(parser: argparse.ArgumentParser) -> None:
    """The options of `ppleval compare`."""
    parser.add_argument("--base", required=True, help="a model as --model, or what save-base wrote")
    add_names(parser)
    add_texts(parser)
    add_scoring(parser)
    add_model(parser)
    add_output(parser)


def add_save_base(parser: argparse.ArgumentParser) -> None:
    """The options of `ppleval save-base`."""
    add_names(parser)
    parser.add_argument(
        "--to", type=Path, required=True, metavar="DIR", help="where to write it; continues one"
    )
    add_texts(parser)
    add_scoring(parser)
    add_model(parser)


def add_names(parser: argparse.ArgumentParser) -> None:
    """The model and the files."""
    parser.add_argument("--model", required=True, help="a directory, or a name on the Hub")
    parser.add_argument("files", nargs="*", metavar="FILE", help="[standard input]")


def add_texts(parser: argparse.ArgumentParser) -> None:
    """Which texts are read."""
    texts = parser.add_argument_group("texts")
    texts.add_argument("--lines", action="store_true", help="each line of a plain file is a text")
    texts.add_argument(
        "--dataset", metavar="NAME[:CONFIG][:SPLIT]", help="of the Hub, a directory, or a file"
    )
    texts.add_argument(
        "--column", default="text", help="the column of a table or dataset with the texts [text]"
    )
    texts.add_argument(
        "--context-column", metavar="COLUMN", help="what conditions each text and is not scored"
    )
    texts.add_argument(
        "--max-text-bytes",
        type=int,
        default=MAX_TEXT_BYTES,
        metavar="N",
        help="of one text, also unpacked; a longer one ends the run [2**30]",
    )
    texts.add_argument("--limit", type=int, metavar="N", help="only the first N texts [all]")


def add_scoring(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """What changes the numbers of the texts; the group of these options."""
    scoring = parser.add_argument_group("scoring")
    scoring.add_argument("--preset", help="whose numbers to give, such as lm-eval [none]")
    scoring.add_argument("--window", type=int, help="tokens read at once [the model's context]")
    scoring.add_argument("--stride", type=int, help="tokens scored by each window [half of it]")
    scoring.add_argument("--max-length", type=int, help="cut texts to this many tokens [never]")
    scoring.add_argument("--no-start-token", action="store_true", help="no BOS before a text")
    scoring.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="for conversations [the tokenizer's]"
    )
    scoring.add_argument("--batch-size", type=int, help="at most this many windows at once")
    return scoring


def add_model(parser: argparse.ArgumentParser) -> None:
    """How the model is loaded."""
    model = parser.add_argument_group("model")
    model.add_argument("--device", help="whatever torch takes [cuda if there is one, else cpu]")
    model.add_argument("--dtype", help="of the weights, such as bfloat16 [as stored]")
    model.add_argument("--revision", help="branch, tag or commit on the Hub")
    model.add_argument("--trust-remote-code", action="store_true")
    cli_models.add_options(model)


def add_ray(parser: argparse.ArgumentParser) -> None:
    """Workers of a Ray cluster."""
    ray = parser.add_argument_group(
        "Ray",
        "FILE may be a URI such as s3://bucket/data.parquet; one that ends in / is a directory.",
    )
    ray.add_argument(
        "--engine", choices=["ray"], help="workers of the cluster RAY_ADDRESS, else of this machine"
    )
    ray.add_argument("--workers", type=int, metavar="N", help="[one for each GPU, else CPU]")


def add_output(parser: argparse.ArgumentParser) -> None:
    """What comes out, and where."""
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json",
        action="store_true",
        help="the result as one JSON object, without lists, and with null for NaN and infinity",
    )
    output.add_argument(
        "--group-by",
        metavar="COLUMN",
        help="also a result for each value of a column; `file`: for each FILE",
    )
    output.add_argument(
        "--positions", action="store_true", help="also a result by tokens of available context"
    )
    output.add_argument(
        "--plot", type=Path, metavar="FILE", help="a picture of the result: .png, .svg or .pdf"
    )
    output.add_argument(
        "--per-text", metavar="OUT", help="one JSON line for each text; with Ray, a directory"
    )
    output.add_argument(
        "--resume", action="store_true", help="continue the interrupted run that wrote --per-text"
    )
    output.add_argument(
        "--overwrite",
        action="store_true",
        help="replace what exists at --plot and, without --resume, at --per-text",
    )


def sources(args: argparse.Namespace) -> list[str]:
    """The dataset or the files to read; "-" is the standard input."""
    return (args.files or ["-"]) if args.dataset is None else [args.dataset]


@dataclass(frozen=True)
class Rule:
    """A sentence for whoever gives an option with others that it does not go with.

    option: the rule is of those who give it; a command may not have it.
    is_broken: whether the arguments, or their lack, break the rule.
    message: the sentence, in which {option} stands for its value.
    """

    option: str
    is_broken: Callable[[argparse.Namespace], Any]
    message: str


def _at_least_1(option: str) -> Rule:
    name = option.replace("_", "-")
    message = f"--{name} must be at least 1, got {{{option}}}"
    return Rule(option, lambda args: getattr(args, option) < 1, message)


# The first one that is broken ends the process.
RULES = (
    Rule(
        "resume",
        lambda args: args.per_text is None,
        "--resume needs --per-text, the file of the run to continue",
    ),
    Rule(
        "overwrite",
        lambda args: args.per_text is None and args.plot is None,
        "--overwrite needs --per-text or --plot, which it lets replace what exists",
    ),
    Rule(
        "device_map",
        lambda args: args.device or args.tensor_parallel,
        "--device-map goes without --device and --tensor-parallel",
    ),
    Rule(
        "tensor_parallel",
        lambda args: args.device,
        "--tensor-parallel goes without --device: each process has its own",
    ),
    Rule("dataset", lambda args: args.files, "--dataset goes without files"),
    Rule(
        "dataset",
        lambda args: args.lines,
        "--dataset goes without --lines: its rows are the texts",
    ),
    *map(_at_least_1, ("limit", "workers", "tensor_parallel", "max_text_bytes")),
    Rule("workers", lambda args: args.engine is None, "--workers needs --engine ray"),
    Rule(
        "engine",
        lambda args: "-" in sources(args) or args.dataset or args.limit or args.tensor_parallel,
        "--engine ray reads files, and goes without --dataset, --limit and --tensor-parallel",
    ),
    Rule(
        "files",
        lambda args: sources(args) == ["-"] and sys.stdin.isatty(),
        "no files, and nothing on the standard input; name a FILE or a --dataset, or pipe a text "
        "to it",
    ),
)


def broken_rule(args: argparse.Namespace) -> str | None:
    """The sentence of the first rule that the arguments break; None if they break none."""
    given = {name for name, value in vars(args).items() if value is not None and value is not False}
    for rule in RULES:
        if rule.option in given and rule.is_broken(args):
            return rule.message.format_map(vars(args))
    return None


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of a command; what it does not take ends the process with a sentence."""
    parser = build_parser()
    commands = parser.get_default("commands")
    if not argv or argv[0] not in (*commands, "--help", "-h", "--version"):
        given = f", got {argv[0]!r}" if argv else ""
        parser.error(f"the first word must be a command, one of {', '.join(commands)}{given}")
    # First, because argparse would name a required option instead of the one that is misspelt.
    for word in itertools.takewhile(lambda word: word != "--", argv[1:]):
        if word.startswith("--") and not _is_known(word, commands[argv[0]]):
            commands[argv[0]].error(about_unknown(word, argv[0], commands))
    args, unknown = parser.parse_known_args(argv)
    message = about_unknown(unknown[0], argv[0], commands) if unknown else broken_rule(args)
    if message is not None:
        commands[args.command].error(message)
    return args


def _is_known(word: str, parser: argparse.ArgumentParser) -> bool:
    """Whether a parser has this option; argparse takes the beginning of one for it."""
    option, _, _ = word.partition("=")
    return any(known.startswith(option) for known in parser._option_string_actions)


def about_unknown(word: str, command: str, commands: dict[str, argparse.ArgumentParser]) -> str:
    """What to do about a word that a command does not take."""
    if not word.startswith("-"):
        return f"{word} stands apart from the other files; name all files side by side"
    option, _, _ = word.partition("=")
    others = [
        f"ppleval {name}"
        for name, parser in commands.items()
        if name != command and _is_known(word, parser)
    ]
    if others:
        return f"{option} is an option of {' and '.join(others)}, not of ppleval {command}"
    similar = difflib.get_close_matches(
        option, commands[command]._option_string_actions, n=1, cutoff=0.8
    )
    hint = f"did you mean {similar[0]}?" if similar else f"ppleval {command} --help has all"
    return f"there is no option {option}; {hint}"
