"""How often the 95% confidence interval holds the truth, by simulation.

    python benchmarks/interval_coverage.py

A corpus is drawn again and again: D texts of equal or of log-normal length, each with a difficulty
of its own, which is the same for all its tokens. The interval of this module, with Student's t at
the effective number of texts less one, stands beside the normal one, with 1.96 in place of t. Only
corpora that count as two effective texts or more have an interval; their share is the last column.
"""

import importlib.util
import math
from pathlib import Path

import numpy as np

NUM_CORPORA = 4000
TRUE_MEAN = 4.0  # nats per token
SPREAD = 0.5  # standard deviation of the difficulty of a text, nats
MEAN_LOG_LENGTH = math.log(100)

# Number of texts, and the standard deviation of the logarithm of their lengths.
CASES = [
    (2, 0.0), (3, 0.0), (5, 0.0), (10, 0.0), (30, 0.0),
    (2, 1.5), (3, 1.5), (5, 1.5), (10, 1.5), (30, 1.5), (100, 1.5),
]  # fmt: skip


def load_totals():
    """totals.py, which needs nothing of its siblings."""
    path = Path(__file__).resolve().parent.parent / "totals.py"
    spec = importlib.util.spec_from_file_location("totals", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def coverage(totals, num_texts: int, sigma: float, rng) -> tuple[float, float, float]:
    """Shares of the corpora: truth in our interval, truth in the normal one, with an interval.

    The first is of the corpora that have an interval, the second of all.
    """
    ours, normal, with_interval = 0, 0, 0
    for _ in range(NUM_CORPORA):
        lengths = np.ceil(np.exp(rng.normal(MEAN_LOG_LENGTH, sigma, num_texts)))
        means = rng.normal(TRUE_MEAN, SPREAD, num_texts)
        found = totals.NllTotals.from_sequences(means * lengths, lengths, 0)
        error = abs(found.mean_nll - TRUE_MEAN)
        normal += error < 1.96 * found.standard_error
        if not math.isnan(found.margin):
            with_interval += 1
            ours += error < found.margin
    return ours / max(1, with_interval), normal / NUM_CORPORA, with_interval / NUM_CORPORA


def main() -> None:
    """Print a table in Markdown."""
    totals, rng = load_totals(), np.random.default_rng(0)
    print(f"{NUM_CORPORA} corpora each; nominal coverage 95%.\n")
    print("| texts | lengths | this module | with 1.96 | have an interval |")
    print("|---:|---|---:|---:|---:|")
    for num_texts, sigma in CASES:
        lengths = "equal" if sigma == 0 else f"log-normal, σ = {sigma}"
        shares = coverage(totals, num_texts, sigma, rng)
        print(
            f"| {num_texts} | {lengths} | " + " | ".join(f"{100 * s:.1f}%" for s in shares) + " |"
        )


if __name__ == "__main__":
    main()
