"""The command `ppleval`: the perplexity of files under a model, and how far it is from another.

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

import argparse
import contextlib
import datetime
import difflib
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ppleval import __version__
from ppleval.cli import models as cli_models
from ppleval.cli.datasets import read_dataset_rows
from ppleval.cli.outputs import check_outputs
from ppleval.cli.sources import MAX_TEXT_BYTES, Columns, Row, limited, read_rows
from ppleval.show import plots
from ppleval.show.tables import as_table, comparison_table
from ppleval.shown import listed, shown, shown_message
from ppleval.texts.inputs import is_conversation

if TYPE_CHECKING:
    import torch

    from ppleval.distributed import Processes
    from ppleval.texts.compare import ByteComparer, TextComparer
    from ppleval.texts.engine import TextScorer


# What launchers say the number of processes in: torchrun and accelerate, and three kinds of MPI.
SIZES_OF_LAUNCHES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


class Parser(argparse.ArgumentParser):
    """A parser whose errors show arguments, which may be names of files, as all others do."""

    def error(self, message: str) -> NoReturn:
        super().error(shown_message(message))


def build_parser() -> argparse.ArgumentParser:
    """The subcommands, each with its options in the order of --help."""
    parser = Parser(
        prog="ppleval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ppleval {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    compute = commands.add_parser("compute", help="the perplexity of texts under a model")
    compare = commands.add_parser(
        "compare", help="how far a model is from a base on the same texts"
    )
    save_base = commands.add_parser("save-base", help="write a base for compare, which reads it")
    parser.set_defaults(commands=commands.choices)  # name -> parser, for errors
    # What a command has no option for is as if it was not given.
    compute.set_defaults(base=None, to=None)
    compare.set_defaults(to=None, pseudo=None, engine=None, workers=None)
    save_base.set_defaults(
        base=None,
        pseudo=None,
        engine=None,
        workers=None,
        group_by=None,
        positions=False,
        plot=None,
        per_text=None,
        resume=False,
        overwrite=False,
        json=False,
    )
    compare.add_argument(
        "--base", required=True, help="a model as --model, or what save-base wrote"
    )
    for command in (compute, compare, save_base):
        command.add_argument("--model", required=True, help="a directory, or a name on the Hub")
        command.add_argument("files", nargs="*", metavar="FILE", help="[standard input]")
    save_base.add_argument(
        "--to", type=Path, required=True, metavar="DIR", help="where to write it; continues one"
    )
    for command in (compute, compare, save_base):
        command.set_defaults(parser=command)  # whose usage goes with an error
        add_texts(command)
        add_scoring(command, with_pseudo=command is compute)
        add_model(command)
    add_ray(compute)
    for command in (compute, compare):
        add_output(command)
    return parser


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


def add_scoring(parser: argparse.ArgumentParser, with_pseudo: bool) -> None:
    """What changes their numbers."""
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
    if with_pseudo:
        scoring.add_argument(
            "--pseudo", metavar="KIND", help="of a masked model: original or within_word_l2r [none]"
        )


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


def run(args: argparse.Namespace) -> dict | None:
    """Score the texts that the arguments name, and return the result of `compute`.

    Under `accelerate launch` or torchrun the processes share the texts. Only the first one writes
    --per-text and returns the result; the others return None.
    """
    if args.engine == "ray":
        return run_on_ray(args)
    import torch  # here, so that --help and wrong usage answer at once

    from ppleval.cli.per_text import PerTextFile

    processes, device = join_launch()
    processes.require_all(processes.attempt(check_places, args, processes))
    rows = processes.require_all(processes.attempt(read, args, processes))
    # A rank that cannot read its files tells the others.
    first = processes.require_all(processes.attempt(first_row, rows, sources(args)))
    groups: list[str] = []
    rows = noting_groups(itertools.chain([first], rows), groups)
    with_contexts = args.context_column is not None
    if args.to is not None:
        return save_base(args, rows, processes)
    options = processes.require_all(
        processes.attempt(checked_options, args, first, processes, device)
    )
    with cli_models.bars_on_terminals_only():
        scorer = load_scorer(args, options, processes)
    signature = scorer.signature(with_contexts)
    with contextlib.ExitStack() as stack:
        log, sums = None, []
        if args.per_text is not None and processes.rank == 0:
            settings = per_text_settings(args, signature)
            log = PerTextFile(
                Path(args.per_text),
                settings,
                scorer.sums_type,
                args.resume,
                args.overwrite,
                len(scorer.edges),
            )
            stack.enter_context(log)
            rows, sums = log.without_finished(rows), log.finished
        num_finished, *_ = processes.gather(processes.attempt(len, sums))
        if processes.rank > 0:
            rows = itertools.islice(rows, num_finished, None)
        first = processes.require_all(processes.attempt(next, rows, None))
        if first is not None:  # all may be finished already
            rows, copy = itertools.tee(itertools.chain([first], rows))
            scored = scorer.sums(
                *texts_and_contexts(copy, args),
                batch_size=args.batch_size,
                progress=sys.stderr.isatty(),
                num_before=num_finished,
                processes=processes,
            )
            for (_, text_sums), row in zip(scored, rows, strict=False):  # fewer if texts are joined
                if log is not None:
                    log.write(len(sums), row, text_sums)
                sums.append(text_sums)
    if processes.size > 1:
        torch.distributed.destroy_process_group()
    if processes.rank > 0:
        return None
    from ppleval.texts.corpus import (
        remarks,
        result_of,
    )  # after errors of files, which need no model

    warn_of_empty(sum(text.num_tokens == 0 for text in sums), len(sums))
    named = None if args.group_by is None else groups
    found = result_of(scorer, sums, named, signature, with_contexts)
    for remark in remarks(found, sums, scorer, "texts"):
        print(f"warning: {remark}", file=sys.stderr)
    return found


def warn_of_empty(num_empty: int, num_texts: int) -> None:
    """Tell of texts that count in no sum."""
    if num_empty > 0:
        print(f"warning: {num_empty} of {num_texts} texts have no token to score", file=sys.stderr)


def run_on_ray(args: argparse.Namespace) -> dict:
    """As `run`, by the workers of a Ray cluster; what cannot go well ends before it is started."""
    from ppleval.cli.sources import files_in
    from ppleval.distributed import num_launched
    from ppleval.ray import cluster as ray_cluster
    from ppleval.ray import files as ray_files

    if num_launched() > 1:
        raise ValueError("--engine ray starts its workers itself; start it as one process.")
    check_outputs(args, args.files)
    files = [file for name in args.files for file in files_in(name)]
    if not files:
        raise ValueError(f"There are no files in {listed(args.files)}.")
    if len(set(files)) < len(files):
        raise ValueError("--engine ray takes each file once, and one is named twice.")
    rows = read_rows(
        files, args.lines, args.column, args.group_by, args.context_column, args.max_text_bytes
    )
    first = first_row(rows, args.files)
    are_conversations = is_conversation(first.text)
    placing = cli_models.placing_kwargs(args, num_processes=1)
    job = ray_files.Job(
        options=model_options(args, placing) | {"conversations": are_conversations},
        lines=args.lines,
        column=args.column,
        group_by=args.group_by,
        context_column=args.context_column,
        max_text_bytes=args.max_text_bytes,
        batch_size=args.batch_size,
        per_text=args.per_text,
        directory=os.getcwd(),
    )
    if ray_files.joins_texts(job):
        raise ValueError(f"--preset {args.preset} joins all texts, so workers cannot share them.")
    output = job.output()
    with contextlib.ExitStack() as stack:
        if output is not None:
            stack.enter_context(output.prepared(args.resume, args.overwrite))
        # Ray tells of workers that died on the standard output, where only the result is to be.
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        stack.enter_context(ray_cluster.cluster(args.workers))
        corpus = ray_files.score_files(job, files, args.workers, args.device)
    totals = corpus.totals
    warn_of_empty(totals.num_empty, totals.num_texts)
    if args.resume:
        print(f"{corpus.num_finished} of {totals.num_texts} texts were done", file=sys.stderr)
    if output is not None and (others := output.num_chunks() - corpus.num_answers) > 0:
        name = shown(output.name)
        print(f"warning: {others} files in {name} are of other texts", file=sys.stderr)
    return corpus.result()


def read(args: argparse.Namespace, processes: "Processes") -> Iterator[Row]:
    """The texts that the arguments name, with their groups; each is read when it is asked for."""
    if args.dataset is not None:
        columns = Columns(args.column, args.group_by, args.context_column)
        rows = read_dataset_rows(args.dataset, columns)
        rows = limited(rows, shown(args.dataset), args.max_text_bytes)
    elif processes.size > 1 and "-" in sources(args):
        raise ValueError("Several processes cannot share the standard input; name files.")
    else:
        rows = read_rows(
            args.files,
            args.lines,
            args.column,
            args.group_by,
            args.context_column,
            args.max_text_bytes,
        )
    return itertools.islice(rows, args.limit)


def sources(args: argparse.Namespace) -> list[str]:
    """The dataset or the files to read; "-" is the standard input."""
    return (args.files or ["-"]) if args.dataset is None else [args.dataset]


def noting_groups(rows: Iterator[Row], groups: list[str]) -> Iterator[Row]:
    """The rows; the group of each, if it has one, is added to `groups` when it is read."""
    for row in rows:
        if row.group is not None:
            groups.append(row.group)
        yield row


def check_places(args: argparse.Namespace, processes: "Processes") -> None:
    """Raises as `check_outputs`, on the rank that writes; the others may be on other machines."""
    if processes.rank == 0:
        check_outputs(args, sources(args))


def checked_options(
    args: argparse.Namespace, first: Row, processes: "Processes", device: "torch.device | None"
) -> dict[str, Any]:
    """The arguments of `text_scorer` for texts that begin with this one; what is wrong with them
    is told before the model is loaded.

    Raises:
        TypeError, ValueError: options that do not go together, or with these texts.
    """
    from ppleval.models.kinds import CausalModel, Seq2SeqModel
    from ppleval.models.loading import ModelSource, split_names
    from ppleval.texts.checks import checked_texts
    from ppleval.texts.options import TextOptions

    options = model_options(args, cli_models.placing_kwargs(args, processes.size), device)
    options["conversations"] = is_conversation(first.text)
    named, of_texts = split_names(options, ModelSource)
    text_options = TextOptions(**of_texts)
    if args.resume and text_options.rules.joint is not None:
        raise ValueError(f"--resume goes by the text, and --preset {args.preset} joins all texts.")
    if args.group_by is not None and text_options.rules.joint is not None:
        raise ValueError(f"--preset {args.preset} joins all texts, so they have no groups.")
    contexts = None if args.context_column is None else [first.context]
    checked_texts([first.text], contexts, text_options, batch_size=args.batch_size)
    source = ModelSource(**named)
    source.check()
    takes_any = args.base is None and args.pseudo is None
    if takes_any and contexts is None and source.kind((CausalModel, Seq2SeqModel)) is Seq2SeqModel:
        raise ValueError(
            f"{args.model} is an encoder-decoder: name --context-column, a column with one source "
            "for each text, which its encoder reads."
        )
    return options


def per_text_settings(args: argparse.Namespace, signature: str) -> dict[str, str]:
    """What the lines of --per-text depend on."""
    settings = {"signature": signature}
    if args.group_by is not None:
        settings["group_by"] = args.group_by
    if args.positions:
        settings["positions"] = "yes"
    return settings


def texts_and_contexts(
    rows: Iterator[Row], args: argparse.Namespace
) -> tuple[Iterator[Any], Iterator[Any] | None]:
    """The texts or conversations, and the contexts if there are any."""
    rows, copy = itertools.tee(rows)
    contexts = None if args.context_column is None else (row.context for row in copy)
    return (row.text for row in rows), contexts


def save_base(args: argparse.Namespace, rows: Iterator[Row], processes: "Processes") -> None:
    """Write the base of the texts.

    Raises:
        ValueError: there are several processes, which cannot write one base.
    """
    from ppleval.metric import Perplexity  # with torch

    if processes.size > 1:
        raise ValueError("save-base runs in one process.")
    options = model_options(args, cli_models.placing_kwargs(args, processes.size))
    texts, contexts = texts_and_contexts(rows, args)
    options["batch_size"] = args.batch_size
    with cli_models.bars_on_terminals_only():
        Perplexity().save_base(texts, args.to, contexts=contexts, **options)
    name = shown(args.to)
    print(f"saved {name}; compare with it by: ppleval compare --base {name}", file=sys.stderr)


def first_row(rows: Iterator[Row], sources: list[str]) -> Row:
    """The first row.

    Raises:
        ValueError: the files or the dataset hold no texts at all.
    """
    row = next(rows, None)
    if row is None:
        names = ["the standard input" if name == "-" else name for name in sources]
        raise ValueError(f"There are no texts in {listed(names)}.")
    return row


def join_launch() -> "tuple[Processes, torch.device | None]":
    """Connect the processes of this launch; return them and, of several, this one's device."""
    from ppleval.distributed import ALONE, Processes

    if all(int(os.environ.get(name, "1")) == 1 for name in SIZES_OF_LAUNCHES):
        return ALONE, None
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    state = PartialState(
        cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available(),
        # The other ranks wait for one that scores a long text. A dead rank loses its connection,
        # and the launcher sees it, so no short timeout is needed.
        timeout=datetime.timedelta(hours=2),
    )
    return Processes.launched(), state.device


def load_scorer(
    args: argparse.Namespace, options: dict[str, Any], processes: "Processes"
) -> "TextScorer | TextComparer | ByteComparer":
    """What scores texts with the arguments' model and options, or compares it with their base."""
    from ppleval.metric import Perplexity
    from ppleval.models.saved_base import SavedBase

    sync = processes.size > 1
    if args.base is None:
        return Perplexity().text_scorer(sync=sync, **options)
    placing = cli_models.placing_kwargs(args, processes.size)
    is_saved = SavedBase.is_at(args.base)
    base: dict[str, Any] = (
        {"base": args.base} if is_saved else {"base_id": args.base, "base_kwargs": placing}
    )
    return Perplexity().text_comparer(sync=sync, **base, **options)


def model_options(
    args: argparse.Namespace, placing: dict, device: "torch.device | None" = None
) -> dict[str, Any]:
    """The arguments that `compute` takes for texts; `placing` are those that place a model."""
    named = {"dtype": args.dtype, "revision": args.revision}
    model_kwargs = {name: value for name, value in named.items() if value is not None}
    device = device if args.device is None else args.device
    return {
        "model_id": args.model,
        "device": device,
        "model_kwargs": model_kwargs
        | placing
        | cli_models.quantization_kwargs(args, placing, device),
        "trust_remote_code": args.trust_remote_code,
        "preset": args.preset,
        "window": args.window,
        "stride": args.stride,
        "max_length": args.max_length,
        "add_start_token": not args.no_start_token,
        "chat_template": None if args.chat_template is None else template(args.chat_template),
        "positions": args.positions,
        "pseudo": args.pseudo,
    }


def template(path: Path) -> str:
    """The text of a chat template."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--chat-template {path} is not UTF-8 text: {error}.") from error


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


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of a subcommand; what it does not take ends the process with a sentence."""
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
    if unknown:
        args.parser.error(about_unknown(unknown[0], argv[0], commands))
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


def reason_of(error: Exception) -> str:
    """The sentence of an error; of the system's the reason and the file, without a number."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {str(error.filename)!r}"
    return " ".join(str(error).split())


def main(argv: list[str] | None = None) -> int:
    """Run the command line, and return the exit status."""
    args = parse(sys.argv[1:] if argv is None else argv)
    parser = args.parser
    if args.resume and args.per_text is None:
        parser.error("--resume needs --per-text, the file of the run to continue")
    if args.overwrite and args.per_text is None and args.plot is None:
        parser.error("--overwrite needs --per-text or --plot, which it lets replace what exists")
    if args.device_map is not None and (args.device or args.tensor_parallel):
        parser.error("--device-map goes without --device and --tensor-parallel")
    if args.tensor_parallel is not None and args.device:
        parser.error("--tensor-parallel goes without --device: each process has its own")
    if args.dataset is not None and args.files:
        parser.error("--dataset goes without files")
    if args.dataset is not None and args.lines:
        parser.error("--dataset goes without --lines: its rows are the texts")
    for name in ("limit", "workers", "tensor_parallel", "max_text_bytes"):
        number = getattr(args, name)
        if number is not None and number < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {number}")
    if args.engine is None and args.workers is not None:
        parser.error("--workers needs --engine ray")
    if args.engine == "ray" and (
        "-" in sources(args) or any((args.dataset, args.limit, args.tensor_parallel))
    ):
        parser.error(
            "--engine ray reads files, and goes without --dataset, --limit and --tensor-parallel"
        )
    if sources(args) == ["-"] and sys.stdin.isatty():
        parser.error(
            "no files, and nothing on the standard input; name a FILE or a --dataset, or pipe a "
            "text to it"
        )
    try:
        result = run(args)
        if result is None:  # the first rank has it, or a base was saved
            return 0
        if args.json:
            from ppleval.cli.per_text import finite

            print(json.dumps(finite(without_lists(result)), allow_nan=False), flush=True)
        else:
            if args.base is None:
                table = as_table(result, args.model)
            else:
                table = comparison_table(result, args.model, args.base)
            print(table, flush=True)
        if args.plot is not None:
            draw(result, args.plot)
    except KeyboardInterrupt:
        hint = "; --resume continues it" if args.per_text is not None else ""
        print(f"interrupted{hint}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        print(f"error: {shown_message(reason_of(error))}", file=sys.stderr)
        return 1
    except MemoryError:
        print(
            "error: memory ran out. Pass a smaller --batch-size or --window, or --max-text-bytes "
            "to refuse long texts.",
            file=sys.stderr,
        )
        return 1
    return 0


def run_and_exit() -> None:
    """Run the command line of this process, and end it."""
    status = main()
    # Skip the interpreter's shutdown: threads of pyarrow (huggingface/datasets issue 7566) and gloo
    # (pytorch pull request 179291) sometimes abort in it. Everything is written by now.
    os._exit(status)
