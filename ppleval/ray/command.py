"""`ppleval compute --engine ray`: arguments -> a job for the workers of a cluster -> its result."""

import argparse
import contextlib
import os
import sys
from typing import TYPE_CHECKING

from ppleval.cli.corpus import Corpus
from ppleval.cli.launch import is_one_of_several
from ppleval.cli.messages import tell, warn, warn_of_empty
from ppleval.cli.models import model_options, placing_kwargs
from ppleval.cli.outputs import check_results
from ppleval.cli.sources import files_in, read_rows
from ppleval.ray import cluster as ray_cluster
from ppleval.ray import files as ray_files
from ppleval.shown import listed, shown
from ppleval.texts.inputs import is_conversation

if TYPE_CHECKING:
    from ppleval.stats.totals import Result


def compute_on_ray(args: argparse.Namespace) -> "Result":
    """Score the texts of the files on a Ray cluster, and return their result.

    Raises:
        ValueError: what cannot go well, before the cluster is started.
    """
    if is_one_of_several():
        raise ValueError("--engine ray starts its workers itself; start it as one process.")
    check_results(args, args.files, to_directory=True)
    files = _files(args)
    job = _job(args, files)
    if ray_files.joins_texts(job):
        raise ValueError(f"--preset {args.preset} joins all texts, so workers cannot share them.")
    output = job.output()
    with contextlib.ExitStack() as stack:
        if output is not None:
            stack.enter_context(output.prepared(args.resume, args.overwrite))
        # Ray tells of workers that died on the standard output, where only the result is to be.
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        stack.enter_context(ray_cluster.cluster(args.workers))
        totals = ray_files.score_files(job, files, args.workers, args.device)
    warn_of_empty(totals.texts.num_empty, totals.texts.num_texts)
    if args.resume:
        tell(f"{totals.num_finished} of {totals.texts.num_texts} texts were done")
    if output is not None and (others := output.num_chunks() - totals.num_answers) > 0:
        warn(f"{others} files in {shown(output.name)} are of other texts")
    return totals.result()


def _files(args: argparse.Namespace) -> list[str]:
    """The files to read, those of directories too, each once."""
    files = [file for name in args.files for file in files_in(name)]
    if not files:
        raise ValueError(f"There are no files in {listed(args.files)}.")
    if len(set(files)) < len(files):
        raise ValueError("--engine ray takes each file once, and one is named twice.")
    return files


def _job(args: argparse.Namespace, files: list[str]) -> ray_files.Job:
    """What the workers are to do; the first text tells whether there are conversations."""
    rows = read_rows(
        files, args.lines, args.column, args.group_by, args.context_column, args.max_text_bytes
    )
    first = Corpus.of(rows, args.files).first
    options = model_options(args, placing_kwargs(args, num_processes=1))
    options |= {"positions": args.positions, "pseudo": args.pseudo}
    return ray_files.Job(
        options=options | {"conversations": is_conversation(first.text)},
        lines=args.lines,
        column=args.column,
        group_by=args.group_by,
        context_column=args.context_column,
        max_text_bytes=args.max_text_bytes,
        batch_size=args.batch_size,
        per_text=args.per_text,
        directory=os.getcwd(),
    )
