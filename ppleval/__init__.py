"""Perplexity of language models, from logits, probabilities, or texts and a model.

    from ppleval import Perplexity

metric.py is what a user calls. The rooms below it, from the ground up: stats (sums -> numbers),
show (numbers -> tables and pictures), logits (kernels), models, texts, trainer. cli is the command.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if sys.version_info < (3, 11):  # noqa: UP036 (run from a clone, where pip refuses nothing)
    raise ImportError(f"ppleval needs Python 3.11 or newer; this is {sys.version.split()[0]}.")

if TYPE_CHECKING:
    from ppleval.logits.nll import token_nll, token_stats
    from ppleval.logits.output_layer import linear_token_nll
    from ppleval.metric import Perplexity
    from ppleval.show.plots import plot
    from ppleval.user_warnings import PerplexityWarning

__version__ = "0.1.0"
__all__ = [
    "Perplexity",
    "PerplexityWarning",
    "__version__",
    "linear_token_nll",
    "plot",
    "token_nll",
    "token_stats",
]

# Each is imported when it is asked for (PEP 562), so that `import ppleval` brings no torch.
_HOMES = {
    "Perplexity": "ppleval.metric",
    "PerplexityWarning": "ppleval.user_warnings",
    "linear_token_nll": "ppleval.logits.output_layer",
    "plot": "ppleval.show.plots",
    "token_nll": "ppleval.logits.nll",
    "token_stats": "ppleval.logits.nll",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
