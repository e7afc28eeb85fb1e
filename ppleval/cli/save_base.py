"""`ppleval save-base`: a corpus under a model -> a directory that `ppleval compare` reads."""

import argparse

from ppleval.cli.corpus import read_corpus, texts_and_contexts
from ppleval.cli.launch import is_one_of_several
from ppleval.cli.messages import tell
from ppleval.cli.models import bars_on_terminals_only, model_options, placing_kwargs
from ppleval.cli.options import sources
from ppleval.cli.outputs import check_base
from ppleval.shown import shown


def save_base(args: argparse.Namespace) -> None:
    """Write the base of the texts that the arguments name.

    Raises:
        ValueError: there are several processes, which cannot write one base.
    """
    if is_one_of_several():
        raise ValueError("save-base runs in one process.")
    check_base(args, sources(args))
    corpus = read_corpus(args, num_processes=1)
    options = model_options(args, placing_kwargs(args, num_processes=1))
    texts, contexts = texts_and_contexts(corpus.rows, args.context_column is not None)
    from ppleval.metric import Perplexity  # with torch; after errors of files, which need none

    with bars_on_terminals_only():
        Perplexity().save_base(
            texts, args.to, contexts=contexts, batch_size=args.batch_size, **options
        )
    name = shown(args.to)
    tell(f"saved {name}; compare with it by: ppleval compare --base {name}")
