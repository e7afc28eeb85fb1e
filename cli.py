"""Perplexity of files under a model, from the command line.

    python cli.py --model tiny_model book.txt
    python cli.py --model tiny_model --column text data.jsonl --per-text scores.jsonl
    accelerate launch cli.py --model tiny_model --column text data.jsonl

A plain file is one text, in UTF-8. With --lines each line is one; only \\n and \\r\\n end a line.
A table holds one text per row, in --column: .csv, .tsv, .json, .parquet, and JSON Lines as .jsonl,
.jsonlines, .jl, .ndjson or .ldjson. All but .parquet may be compressed: .gz, .bz2, .xz, .lzma,
.zst. Standard input (no files, or -) is read as a plain file. The processes of torchrun or
`accelerate launch` share the texts. Exit status: 0 done, 1 failed (one line says why), 2 wrong
usage, 130 interrupted.
"""

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, get_type_hints

import metric_package
from text_files import read_texts

if TYPE_CHECKING:
    import torch

    from processes import Processes
    from text_scoring import TextScorer
    from totals import TextSums

T = TypeVar("T")


def build_parser() -> argparse.ArgumentParser:
    """The options, in the order of --help."""
    parser = argparse.ArgumentParser(
        prog="cli.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="*", metavar="FILE", help="standard input if there is none")
    parser.add_argument("--model", required=True, help="a directory, or a name on the Hub")

    texts = parser.add_argument_group("texts")
    texts.add_argument("--lines", action="store_true", help="each line of a plain file is a text")
    texts.add_argument(
        "--column", default="text", help="the column of a table with the texts [text]"
    )

    scoring = parser.add_argument_group("scoring")
    scoring.add_argument("--preset", help="whose numbers to give, such as lm-eval [none]")
    scoring.add_argument("--window", type=int, help="tokens read at once [the model's context]")
    scoring.add_argument("--stride", type=int, help="tokens scored by each window [half of it]")
    scoring.add_argument("--max-length", type=int, help="cut texts to this many tokens [never]")
    scoring.add_argument("--no-start-token", action="store_true", help="no BOS before a text")
    scoring.add_argument("--batch-size", type=int, help="at most this many windows at once")

    model = parser.add_argument_group("model")
    model.add_argument("--device", help="whatever torch takes [cuda if there is one, else cpu]")
    model.add_argument("--dtype", help="of the weights, such as bfloat16 [as stored]")
    model.add_argument("--revision", help="branch, tag or commit on the Hub")
    model.add_argument("--trust-remote-code", action="store_true")

    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="the result as one JSON object")
    output.add_argument("--per-text", type=Path, metavar="OUT", help="one JSON line for each text")
    output.add_argument(
        "--resume", action="store_true", help="continue the interrupted run that wrote --per-text"
    )
    return parser


class PerTextFile:
    """JSON lines: the settings, then the sums of each text as soon as it is scored.

    Args:
        path: the file. It is overwritten; with `resume` it is continued, if it exists.
        signature: the settings of this run.

    Raises:
        ValueError: `resume` on a file of other settings, or one that --per-text did not write.
    """

    def __init__(self, path: Path, signature: str, resume: bool):
        self.path = path
        self.finished: list[TextSums] = []
        self._fingerprints: list[str] = []
        length = 0
        if resume and path.exists():
            data = path.read_bytes()
            # A killed run may leave half a line: it has no line end, and does not count.
            length = data.rfind(b"\n") + 1
            if length > 0:
                self._read(data[:length].splitlines(), signature)
            elif not self._line({"signature": signature}).startswith(data):
                raise ValueError(f"{path} was not written by --per-text.")
        self._file = open(path, "r+b" if length > 0 else "wb")  # noqa: SIM115
        if length > 0:
            self._file.truncate(length)
            self._file.seek(length)
        else:  # a device, such as /dev/full, cannot be truncated
            self._write_line({"signature": signature})

    def __enter__(self) -> "PerTextFile":
        return self

    def __exit__(self, *error) -> None:
        with self._named_errors():
            self._file.close()

    def _read(self, lines: list[bytes], signature: str) -> None:
        text_sums = metric_package.sibling("totals").TextSums
        kinds = get_type_hints(text_sums)
        with self._named_line(1):
            written = _field(json.loads(lines[0]), "signature", str)
        for number, line in enumerate(lines[1:], start=2):
            with self._named_line(number):
                row = json.loads(line)
                sums = {name: _field(row, name, kind) for name, kind in kinds.items()}
                self.finished.append(text_sums(**sums))
                self._fingerprints.append(_field(row, "fingerprint", str))
        if written != signature:
            raise ValueError(
                f"{self.path} is of a run with other settings, {written}; now they are {signature}."
            )

    @contextlib.contextmanager
    def _named_line(self, number: int) -> Iterator[None]:
        """Name the line in an error of its contents."""
        try:
            yield
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{self.path}: line {number} was not written by --per-text."
            ) from error

    def without_finished(self, texts: Iterator[str]) -> Iterator[str]:
        """The texts after the finished ones.

        Raises:
            ValueError: the finished texts are not those of the interrupted run.
        """
        for number, known in enumerate(self._fingerprints):
            text = next(texts, None)
            if text is None or fingerprint(text) != known:
                raise ValueError(
                    f"{self.path} is of other texts: number {number} is not the one scored then."
                )
        return texts

    def write(self, number: int, text: str, sums: "TextSums") -> None:
        """Add the sums of a text."""
        row = {"text": number, "fingerprint": fingerprint(text), "perplexity": sums.perplexity}
        # JSON has no NaN and no infinity: null in `perplexity`, strings in the sums, for --resume.
        exact = {
            name: value if math.isfinite(value) else str(value)
            for name, value in dataclasses.asdict(sums).items()
        }
        self._write_line(finite(row) | exact)

    @staticmethod
    def _line(row: dict) -> bytes:
        return json.dumps(row, allow_nan=False).encode() + b"\n"

    def _write_line(self, row: dict) -> None:
        with self._named_errors():
            self._file.write(self._line(row))
            self._file.flush()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Name the file in an error of a write, such as that of a full disk."""
        try:
            yield
        except OSError as error:
            error.filename = str(self.path)
            raise


def _field(row: dict, name: str, kind: type[T]) -> T:
    """A field of a per-text row. NaN and infinity are strings there."""
    value = row[name]
    if kind is float and isinstance(value, str):
        value = float(value)
    if type(value) is not kind:
        raise TypeError(f"{name} must be {kind.__name__}, got {value!r}")
    return value


def finite(values: dict) -> dict:
    """The values with None for NaN and infinity, which JSON does not have."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def fingerprint(text: str) -> str:
    """A hash of a text. --resume compares it to see whether the texts are the same."""
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()[:16]


def run(args: argparse.Namespace) -> dict | None:
    """Score the texts that the arguments name, and return the result of `compute`.

    Under `accelerate launch` or torchrun the processes share the texts. Only the first one writes
    --per-text and returns the result; the others return None.
    """
    import torch  # here, so that --help and wrong usage answer at once

    processes, device = join_launch()
    if processes.size > 1 and (not args.files or "-" in args.files):
        raise ValueError("Several processes cannot share the standard input; name files.")
    texts = read_texts(args.files, args.lines, args.column)
    scorer = load_scorer(args, device, sync=processes.size > 1)
    signature = scorer.signature(with_contexts=False)
    if args.resume and scorer.joins_texts:
        raise ValueError(f"--resume goes by the text, and --preset {args.preset} joins all texts.")
    if args.per_text is not None and args.per_text.exists():
        for name in args.files:
            if Path(name).exists() and args.per_text.samefile(name):
                raise ValueError(f"--per-text would overwrite {name}, which is to be read.")
    with contextlib.ExitStack() as stack:
        log, sums = None, []
        if args.per_text is not None and processes.rank == 0:
            log = stack.enter_context(PerTextFile(args.per_text, signature, args.resume))
            texts, sums = log.without_finished(texts), log.finished
        num_finished, *_ = processes.gather(processes.attempt(len, sums))
        if processes.rank > 0:
            texts = itertools.islice(texts, num_finished, None)
        mine = processes.attempt(next_text, texts, num_finished, args.files)
        first = processes.require_all(mine)  # a rank that cannot read a file tells the others
        if first is not None:  # all may be finished already
            remaining = itertools.chain([first], texts)
            for text, text_sums in scorer.sums(
                remaining,
                batch_size=args.batch_size,
                progress=sys.stderr.isatty(),
                processes=processes,
            ):
                if log is not None:
                    log.write(len(sums), text, text_sums)
                sums.append(text_sums)
    if processes.size > 1:
        torch.distributed.destroy_process_group()
    if processes.rank > 0:
        return None
    empty = sum(text.num_tokens == 0 for text in sums)
    if empty > 0:
        print(f"warning: {empty} of {len(sums)} texts have no token to score", file=sys.stderr)
    return scorer.result(sums, signature, with_contexts=False)


def next_text(texts: Iterator[str], num_finished: int, files: list[str]) -> str | None:
    """The first text that is not finished; None if all are.

    Raises:
        ValueError: the files hold no texts at all.
    """
    text = next(texts, None)
    if text is None and num_finished == 0:
        names = ("the standard input" if name == "-" else name for name in files or ["-"])
        raise ValueError(f"There are no texts in {', '.join(names)}.")
    return text


def join_launch() -> "tuple[Processes, torch.device | None]":
    """Connect the processes of this launch; return them and, of several, this one's device."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    state = PartialState(
        cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available(),
        # The other ranks wait for one that scores a long text. A dead rank loses its connection,
        # and the launcher sees it, so no short timeout is needed.
        timeout=datetime.timedelta(hours=2),
    )
    processes = metric_package.sibling("processes").Processes.launched()
    return processes, state.device if state.num_processes > 1 else None


def load_scorer(
    args: argparse.Namespace, device: "torch.device | None", sync: bool
) -> "TextScorer":
    """The scorer of the arguments' model and options."""
    model_kwargs = {"dtype": args.dtype, "revision": args.revision}
    return metric_package.load().text_scorer(
        model_id=args.model,
        device=device if args.device is None else args.device,
        model_kwargs={name: value for name, value in model_kwargs.items() if value is not None},
        trust_remote_code=args.trust_remote_code,
        sync=sync,
        preset=args.preset,
        window=args.window,
        stride=args.stride,
        max_length=args.max_length,
        add_start_token=not args.no_start_token,
    )


def as_table(result: dict, model: str) -> str:
    """The result for people."""
    low, high = result["perplexity_ci_low"], result["perplexity_ci_high"]
    interval = f"95% interval {low:.2f} to {high:.2f}"
    if math.isnan(low):
        interval = "no 95% interval: too few texts, or too unequal ones"
    rows = [
        ("perplexity", f"{result['perplexity']:.2f}", interval),
        ("mean perplexity", f"{result['mean_perplexity']:.2f}", "mean of one for each text"),
        ("bits per token", f"{result['bits_per_token']:.3f}", ""),
        ("bits per byte", f"{result['bits_per_byte']:.3f}", ""),
        ("word perplexity", f"{result['word_perplexity']:.2f}", ""),
        ("texts", f"{result['num_sequences']:,}", ""),
        ("tokens", f"{result['num_tokens']:,}", ""),
        ("bytes", f"{result['num_bytes']:,}", ""),
    ]
    if result.get("num_truncated", 0) > 0:
        rows.append(("texts cut", f"{result['num_truncated']:,}", "by --max-length"))
    lines = [f"  {name:<16}{value:>12}   {note}".rstrip() for name, value, note in rows]
    return "\n".join([model, *lines, f"  {result['signature']}"])


def main(argv: list[str] | None = None) -> int:
    """Run the command line, and return the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.resume and args.per_text is None:
        parser.error("--resume needs --per-text, the file of the run to continue")
    if not args.files and sys.stdin.isatty():
        parser.error("no files, and nothing on the standard input")
    try:
        result = run(args)
        if result is None:  # the first rank has it
            return 0
        if args.json:
            shown = {name: value for name, value in result.items() if name != "perplexities"}
            print(json.dumps(finite(shown), allow_nan=False), flush=True)
        else:
            print(as_table(result, args.model), flush=True)
    except KeyboardInterrupt:
        hint = "; --resume continues it" if args.per_text is not None else ""
        print(f"interrupted{hint}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    status = main()
    # Skip the interpreter's shutdown: threads of pyarrow (huggingface/datasets issue 7566) and gloo
    # (pytorch pull request 179291) sometimes abort in it. Everything is written by now.
    os._exit(status)
