"""How often the 95% confidence interval holds the truth, by simulation.

    python benchmarks/interval_coverage.py

A corpus is drawn again and again: D texts of equal or of log-normal length, each with a difficulty
of its own, which is the same for all its tokens. The interval of this module, with Student's t at
the effective number of texts less one, stands beside the normal one, with 1.96 in place of t. Only
corpora that count as two effective texts or more have an interval; their share is the last column.

Then the paired interval of the difference of two models, on texts whose difficulty they share,
beside that of two separate intervals.
"""

import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ppleval.stats.pairs import paired_difference
from ppleval.stats.totals import NllTotals

NUM_CORPORA = 4000
TRUE_MEAN = 4.0  # nats per token
SPREAD = 0.5  # standard deviation of the difficulty of a text, nats
MEAN_LOG_LENGTH = math.log(100)
TRUE_DIFFERENCE, SPREAD_OF_DIFFERENCE = 0.02, 0.05  # of two models' means in a text, nats

# Number of texts, and the standard deviation of the logarithm of their lengths.
CASES = [
    (2, 0.0), (3, 0.0), (5, 0.0), (10, 0.0), (30, 0.0),
    (2, 1.5), (3, 1.5), (5, 1.5), (10, 1.5), (30, 1.5), (100, 1.5),
]  # fmt: skip


PAIRED_CASES = [(5, 0.0), (40, 0.0), (40, 0.5), (40, 1.5)]


def coverage(num_texts: int, sigma: float, rng) -> tuple[float, float, float]:
    """Shares of the corpora: truth in our interval, truth in the normal one, with an interval.

    The first is of the corpora that have an interval, the second of all.
    """
    ours, normal, with_interval = 0, 0, 0
    for _ in range(NUM_CORPORA):
        lengths = np.ceil(np.exp(rng.normal(MEAN_LOG_LENGTH, sigma, num_texts)))
        means = rng.normal(TRUE_MEAN, SPREAD, num_texts)
        found = NllTotals.from_sequences(means * lengths, lengths, 0)
        error = abs(found.mean_nll - TRUE_MEAN)
        normal += error < 1.96 * found.standard_error
        if not math.isnan(found.margin):
            with_interval += 1
            ours += error < found.margin
    return ours / max(1, with_interval), normal / NUM_CORPORA, with_interval / NUM_CORPORA


def paired_coverage(num_texts: int, sigma: float, rng) -> list[float]:
    """Shares of the corpora that have intervals: truth in the paired one, in that of two separate
    ones; and how many times as wide the latter is."""
    paired, separate, widths = 0, 0, []
    for _ in range(NUM_CORPORA):
        lengths = np.ceil(np.exp(rng.normal(MEAN_LOG_LENGTH, sigma, num_texts)))
        base = rng.normal(TRUE_MEAN, SPREAD, num_texts)
        model = base + rng.normal(TRUE_DIFFERENCE, SPREAD_OF_DIFFERENCE, num_texts)
        sums, base_sums = (
            list(zip((means * lengths).tolist(), lengths.tolist(), strict=True))
            for means in (model, base)
        )
        difference, low, high = paired_difference(sums, base_sums)
        if math.isnan(low):
            continue
        margin = math.hypot(
            *(
                NllTotals.from_sequences(means * lengths, lengths, 0).margin
                for means in (model, base)
            )
        )
        paired += low < TRUE_DIFFERENCE < high
        separate += abs(difference - TRUE_DIFFERENCE) < margin
        widths.append(2 * margin / (high - low))
    return [paired / len(widths), separate / len(widths), float(np.median(widths))]


def main() -> None:
    """Print a table in Markdown."""
    rng = np.random.default_rng(0)
    print(f"{NUM_CORPORA} corpora each; nominal coverage 95%.\n")
    print("| texts | lengths | this module | with 1.96 | have an interval |")
    print("|---:|---|---:|---:|---:|")
    for num_texts, sigma in CASES:
        lengths = "equal" if sigma == 0 else f"log-normal, σ = {sigma}"
        shares = coverage(num_texts, sigma, rng)
        print(
            f"| {num_texts} | {lengths} | " + " | ".join(f"{100 * s:.1f}%" for s in shares) + " |"
        )
    print(f"\nPaired, {NUM_CORPORA} corpora each.\n")
    print("| texts | lengths | paired | two separate intervals | their width / the paired one's |")
    print("|---:|---|---:|---:|---:|")
    for num_texts, sigma in PAIRED_CASES:
        lengths = "equal" if sigma == 0 else f"log-normal, σ = {sigma}"
        own, separate, width = paired_coverage(num_texts, sigma, rng)
        print(f"| {num_texts} | {lengths} | {own:.1%} | {separate:.1%} | {width:.1f} |")


if __name__ == "__main__":
    main()
