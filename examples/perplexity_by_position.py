"""What is context worth to a model? The bundled one on its held-out text, as a picture.

    python examples/perplexity_by_position.py docs/perplexity_by_position.png

Every token is scored with as many tokens in front of it as its place gives it; the picture shows
the perplexity of those with 1 of them, with 2 or 3, with 4 to 7, and so on.
"""

import json
import sys
from pathlib import Path

from ppleval import Perplexity

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "tiny_model"
# Of a piece, which then fits into the window and has tokens in every bucket but the last.
CHARACTERS = 1200


def held_out_pieces() -> list[str]:
    """Whole lines of the documents that the model was not trained on, about equally many letters.

    A piece that began within a word would make the first tokens harder than they are.
    """
    pieces = []
    for line in (MODEL / "held_out.jsonl").read_text(encoding="utf-8").splitlines():
        piece = ""
        for text in json.loads(line)["text"].splitlines(keepends=True):
            piece += text
            if len(piece) >= CHARACTERS:
                pieces.append(piece)
                piece = ""
    return pieces


def main(path: str) -> None:
    """Score the pieces and write the picture."""
    ppl = Perplexity()
    result = ppl.compute(predictions=held_out_pieces(), model_id=str(MODEL), positions=True)
    figure, _ = ppl.plot(result)
    figure.savefig(path, dpi=200)


if __name__ == "__main__":
    main(sys.argv[1])
