"""The metric, as cli.py, the demo and the tests reach it. Nothing of the metric imports this file.

evaluate copies perplexity.py and its siblings into a package of its own. `import totals` would load
totals.py a second time, and an `NllTotals` of one copy cannot be added to one of the other.
"""

import importlib
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from perplexity import Perplexity

SCRIPT = str(Path(__file__).resolve().with_name("perplexity.py"))


def load(**options) -> "Perplexity":
    """The metric, as `evaluate.load` gives it with these options."""
    import evaluate  # here, so that `cli.py --help` and wrong usage answer at once

    return cast("Perplexity", evaluate.load(SCRIPT, **options))


def sibling(name: str) -> ModuleType:
    """A neighbour of perplexity.py by its name, such as "totals": the module the metric uses."""
    from evaluate.loading import evaluation_module_factory

    package = evaluation_module_factory(SCRIPT).module_path.rpartition(".")[0]
    return importlib.import_module(f"{package}.{name}")
