"""`ppleval compute` and `ppleval compare`: a corpus is scored -> its result."""

import argparse
import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppleval.cli.corpus import Corpus, read_corpus, texts_and_contexts
from ppleval.cli.launch import join_launch
from ppleval.cli.messages import warn, warn_of_empty
from ppleval.cli.models import (
    bars_on_terminals_only,
    load_comparer,
    load_scorer,
    model_options,
    placing_kwargs,
)
from ppleval.cli.options import sources
from ppleval.cli.outputs import check_results
from ppleval.cli.rows import Row
from ppleval.texts.inputs import is_conversation

if TYPE_CHECKING:
    import torch

    from ppleval.cli.per_text import PerTextFile
    from ppleval.distributed import Processes
    from ppleval.models.loading import ModelSource
    from ppleval.stats.totals import Result
    from ppleval.texts.compare import ByteComparer, TextComparer
    from ppleval.texts.engine import TextScorer

    Scorer = TextScorer | TextComparer | ByteComparer


def compute(args: argparse.Namespace) -> "Result | None":
    """The result of `ppleval compute`; None on all processes but the first."""
    if args.engine == "ray":
        from ppleval.ray.command import compute_on_ray

        return compute_on_ray(args)
    return _score(args, {"positions": args.positions, "pseudo": args.pseudo}, load_scorer)


def compare(args: argparse.Namespace) -> "Result | None":
    """The result of `ppleval compare`; None on all processes but the first."""
    return _score(args, {"positions": args.positions}, load_comparer)


def _score(
    args: argparse.Namespace, options: dict[str, Any], load: "Callable[..., Scorer]"
) -> "Result | None":
    """Score the texts that the arguments name, and return their result.

    Under `accelerate launch` or torchrun the processes share the texts. Only the first one writes
    --per-text and returns the result; the others return None.

    Args:
        options: of `Perplexity`, those that this command alone gives.
        load: what loads the model, and the base if there is one.
    """
    import torch  # here, so that --help and wrong usage answer at once

    processes, device = join_launch()
    processes.require_all(processes.attempt(_check_places, args, processes))
    # A rank that cannot read its files tells the others.
    read = processes.attempt(read_corpus, args, processes.size, args.group_by)
    corpus = processes.require_all(read)
    checked = processes.attempt(_checked_options, args, options, corpus.first, processes, device)
    options = processes.require_all(checked)
    with bars_on_terminals_only():
        scorer = load(args, options, processes.size)
    signature = scorer.signature(args.context_column is not None)
    with _per_text_file(args, scorer, signature, processes) as log:
        _score_rest(corpus, args, scorer, log, processes)
    if processes.size > 1:
        torch.distributed.destroy_process_group()
    return _result(corpus, args, scorer, signature) if processes.rank == 0 else None


def _check_places(args: argparse.Namespace, processes: "Processes") -> None:
    """Raises as `check_results`, on the rank that writes; the others may be on other machines."""
    if processes.rank == 0:
        check_results(args, sources(args))


def _checked_options(
    args: argparse.Namespace,
    more: dict[str, Any],
    first: Row,
    processes: "Processes",
    device: "torch.device | None",
) -> dict[str, Any]:
    """The arguments of a scorer for texts that begin with this one; what is wrong with them is
    told before the model is loaded.

    Args:
        more: those that this command alone gives.

    Raises:
        TypeError, ValueError: options that do not go together, or with these texts.
    """
    from ppleval.models.loading import ModelSource, split_names
    from ppleval.texts.checks import checked_texts
    from ppleval.texts.options import TextOptions

    options = model_options(args, placing_kwargs(args, processes.size), device) | more
    options["conversations"] = is_conversation(first.text)
    of_model, of_texts = split_names(options, ModelSource)
    text_options = TextOptions(**of_texts)
    if text_options.rules.joint is not None:
        _check_joint(args)
    contexts = None if args.context_column is None else [first.context]
    checked_texts([first.text], contexts, text_options, batch_size=args.batch_size)
    source = ModelSource(**of_model)
    source.check()
    if args.command == "compute" and args.pseudo is None and contexts is None:
        _check_reads_no_source(source, args.model)
    return options


def _check_joint(args: argparse.Namespace) -> None:
    """Raises ValueError for what needs single texts, where the preset joins all."""
    if args.resume:
        raise ValueError(f"--resume goes by the text, and --preset {args.preset} joins all texts.")
    if args.group_by is not None:
        raise ValueError(f"--preset {args.preset} joins all texts, so they have no groups.")


def _check_reads_no_source(source: "ModelSource", model: str) -> None:
    """Raises ValueError for an encoder-decoder, whose encoder reads a source for each text."""
    from ppleval.models.kinds import CausalModel, Seq2SeqModel

    if source.kind((CausalModel, Seq2SeqModel)) is Seq2SeqModel:
        raise ValueError(
            f"{model} is an encoder-decoder: name --context-column, a column with one source for "
            "each text, which its encoder reads."
        )


@contextlib.contextmanager
def _per_text_file(
    args: argparse.Namespace, scorer: "Scorer", signature: str, processes: "Processes"
) -> "Iterator[PerTextFile | None]":
    """The file of --per-text, on the rank that writes it; else None."""
    if args.per_text is None or processes.rank > 0:
        yield None
        return
    from ppleval.cli.per_text import PerTextFile

    settings = {"signature": signature}
    if args.group_by is not None:
        settings["group_by"] = args.group_by
    if args.positions:
        settings["positions"] = "yes"
    path, kind, num_buckets = Path(args.per_text), scorer.sums_type, len(scorer.edges)
    with PerTextFile(path, settings, kind, args.resume, args.overwrite, num_buckets) as file:
        yield file


def _score_rest(
    corpus: Corpus,
    args: argparse.Namespace,
    scorer: "Scorer",
    file: "PerTextFile | None",
    processes: "Processes",
) -> None:
    """Score the texts that no interrupted run has scored, and write the sums of each."""
    rows = corpus.rows if file is None else file.without_finished(corpus)
    num_finished, *_ = processes.gather(processes.attempt(len, corpus.sums))
    if processes.rank > 0:
        rows = itertools.islice(rows, num_finished, None)
    first = processes.require_all(processes.attempt(next, rows, None))
    if first is None:  # all are finished already
        return
    rows, copy = itertools.tee(itertools.chain([first], rows))
    scored = scorer.sums(
        *texts_and_contexts(copy, args.context_column is not None),
        batch_size=args.batch_size,
        progress=sys.stderr.isatty(),
        num_before=num_finished,
        processes=processes,
    )
    for (_, sums), row in zip(scored, rows, strict=False):  # fewer if texts are joined
        if file is not None:
            file.write(len(corpus.sums), row, sums)
        corpus.add(sums, row.group)


def _result(corpus: Corpus, args: argparse.Namespace, scorer: "Scorer", signature: str) -> "Result":
    """The result of a scored corpus; what makes it worth a second look is told."""
    # After errors of files, which need no model.
    from ppleval.texts.corpus import remarks, result_of

    sums, groups = corpus.sums, None if args.group_by is None else corpus.groups
    warn_of_empty(sum(text.num_tokens == 0 for text in sums), len(sums))
    result = result_of(scorer, sums, groups, signature, args.context_column is not None)
    for remark in remarks(result, sums, scorer, "texts"):
        warn(remark)
    return result
