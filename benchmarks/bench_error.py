"""How does the error of the nll grow with the size of the logits?

Against float64 of the same logits, beside F.cross_entropy, which is given 16-bit logits in float32.

    python benchmarks/bench_error.py
"""

import torch
import torch.nn.functional as F
from report import environment, table, write_section

from ppleval import token_nll

SHAPE = 1000, 50257
SCALES = (1, 4, 10, 30, 100)  # standard deviations of the logits


def errors(values: torch.Tensor, truth: torch.Tensor) -> list[str]:
    """That of the mean, which keeps its sign, and the largest of a token, in nats."""
    differences = values.double() - truth
    return [f"{differences.mean():.0e}", f"{differences.abs().max():.0e}"]


def rows_of(dtype: torch.dtype) -> list[list[str]]:
    """A row for each scale."""
    rows = []
    for scale in SCALES:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(SHAPE, generator=generator).mul_(scale).to(dtype)
        targets = torch.randint(SHAPE[1], SHAPE[:1], generator=generator)
        truth = torch.cat(
            [
                F.cross_entropy(some.double(), ids, reduction="none")
                for some, ids in zip(logits.split(100), targets.split(100), strict=True)
            ]
        )
        other = F.cross_entropy(logits.float(), targets, reduction="none")
        name = str(dtype).removeprefix("torch.")
        measured = errors(token_nll(logits, targets), truth) + errors(other, truth)
        rows.append([f"{name}, {scale}", *measured])
    return rows


def main() -> None:
    """Measure, and write the section of RESULTS.md."""
    header = ["dtype, standard deviation", "mean", "largest", "F.cross_entropy: mean", "largest"]
    dtypes = torch.float32, torch.float16, torch.bfloat16
    body = table(header, [row for dtype in dtypes for row in rows_of(dtype)])
    about = f"{SHAPE[0]} x {SHAPE[1]} normal logits; errors in nats against float64 of the same."
    write_section(
        "The error of the nll by the size of the logits (bench_error.py)",
        f"{environment(['torch'])}\n{about}\n\n{body}",
    )


if __name__ == "__main__":
    main()
