"""What the command says on the standard error; the standard output is the result's."""

import sys


def tell(sentence: str) -> None:
    """Print a sentence for people."""
    print(sentence, file=sys.stderr)


def warn(sentence: str) -> None:
    """Print a sentence about what makes a number worth a second look."""
    tell(f"warning: {sentence}")


def warn_of_empty(num_empty: int, num_texts: int) -> None:
    """Tell of texts that count in no sum."""
    if num_empty > 0:
        warn(f"{num_empty} of {num_texts} texts have no token to score")
