"""The score of one text: a `Draft` collects the nll of its windows and becomes a `TextScore`.

engine.py scores many texts in batches; stats/totals.py adds up their sums.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ppleval.logits.outputs import TokenStats
from ppleval.show.heatmap import heatmap
from ppleval.show.plot_tokens import plot_score
from ppleval.stats.positions import bucket_sums
from ppleval.stats.totals import NO_POSITIONS, TextSums
from ppleval.texts.encoding import EncodedText
from ppleval.texts.presets import Preset
from ppleval.texts.windows import Window
from ppleval.texts.words import Word, words_of


@dataclass(frozen=True)
class TextScore:
    """One text: its tokens, how surprising each is, and the sums over the scored ones.

    The lists have one entry for each token of the text; start token and context are left out. The
    offsets cover the text without gaps; a space belongs to the token behind it. They are None
    without a fast tokenizer.
    """

    text: str
    tokens: list[str]
    offsets: list[tuple[int, int]] | None  # characters [start, end)
    nll: list[float]  # nats; NaN where not scored
    entropy: list[float]  # of the prediction: the nll it expects, nats; NaN where not scored
    ranks: list[int]  # 1 + the number of likelier tokens; 0 where not scored
    expected: list[list[tuple[str, float]]] | None  # likeliest tokens with their nll; None: top_k=0
    sums: TextSums
    # -log P(a new word begins) before each token and behind the last, nats; NaN where not known.
    # None: corrected=False.
    word_start_nll: list[float] | None = None

    @property
    def perplexity(self) -> float:
        """exp(mean nll); NaN when nothing was scored."""
        return self.sums.perplexity

    @property
    def words(self) -> list[Word]:
        """The words between white space, each with the nll of its tokens; see `words_of`.

        Raises:
            ValueError: there are no offsets.
        """
        return words_of(self)

    def _repr_html_(self) -> str:
        """How a notebook shows it."""
        return heatmap(self)

    def plot(self, ax=None):
        """Draw the surprisal of each token in bits, with the entropy of its prediction as a line.

        Returns (figure, axes) of matplotlib; `ax` are axes to draw in.
        """
        return plot_score(self, ax)


class Draft:
    """The score of a text, filled window by window.

    Args:
        number: that of the text among all texts.
        encoded: the text.
        windows: they score no id twice.
        num_bytes, num_words: of the scored text, from `count_scored`.
        edges: of the buckets by position, if any.
        num_dropped_tokens: that the preset drops behind the last window.
    """

    def __init__(
        self,
        number: int,
        encoded: EncodedText,
        windows: list[Window],
        num_bytes: int,
        num_words: int,
        edges: Sequence[int] = (),
        num_dropped_tokens: int = 0,
    ):
        self.number, self.encoded, self.windows = number, encoded, windows
        self.num_bytes, self.num_words = num_bytes, num_words
        self.num_dropped_tokens = num_dropped_tokens
        self._edges = edges
        # In any order, each behind the number of its first scored id, which no other has.
        self._found: list[tuple[int, Window, TokenStats]] = []
        self._end_share_nll = np.nan

    @property
    def is_complete(self) -> bool:
        """Whether all windows are filled in."""
        return len(self._found) == len(self.windows)

    def fill(self, window: Window, found: TokenStats) -> None:
        """Take the result of a window; those of a text come in any order."""
        if window.reads_end and found.share_nll is not None:  # the end is no scored token
            self._end_share_nll = float(found.share_nll[-1])
            found = found[:-1]
        self._found.append((window.first, window, found))

    def _scored(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(what `TokenStats` has under this name, weight) of each scored id, in order, float64."""
        values, weights = [np.zeros(0)], [np.zeros(0)]
        for _, window, stats in sorted(self._found):
            values.append(getattr(stats, name).numpy())
            weights.append(np.full(len(stats.nll), window.weight))
        return np.concatenate(values).astype(np.float64), np.concatenate(weights)

    def sums(self, name: str = "nll") -> TextSums:
        """The text's part in the result of a corpus, of the nll under this name in `TokenStats`."""
        unweighted, weights = self._scored(name)
        has_weight = weights > 0  # a preset may give a scored token no weight
        return TextSums(
            nll_sum=float(unweighted[has_weight] @ weights[has_weight]),
            weight_sum=float(weights.sum()),
            unweighted_nll_sum=float(unweighted.sum()),
            token_nll_sq_sum=float(unweighted @ unweighted),
            num_tokens=int(np.count_nonzero(has_weight)),
            num_bytes=self.num_bytes,
            num_words=self.num_words,
            num_dropped_tokens=self.num_dropped_tokens,
            truncated=self.encoded.truncated,
            context_truncated=self.encoded.context_truncated
            or (bool(self.windows) and self.windows[0].start > 0),
            positions=bucket_sums(self._contexts(), unweighted, weights, self._edges)
            if self._edges
            else NO_POSITIONS,
        )

    def _contexts(self) -> np.ndarray:
        """How many ids the model could see before each scored id, in order."""
        found = [np.zeros(0, dtype=np.int64)]
        for _, window, _ in sorted(self._found):
            found.append(np.asarray(window.scored, np.int64) - window.start)
        return np.concatenate(found)

    def score(
        self, decode: Callable[[int], str], with_expected: bool, with_word_starts: bool = False
    ) -> TextScore:
        """The score as callers get it; `decode` gives the string of an id."""
        text = self.encoded
        return TextScore(
            text=text.text,
            tokens=list(map(decode, text.ids[text.num_prefix :])),
            offsets=text.offsets(),
            nll=self._column("nll").tolist(),
            entropy=self._column("entropy").tolist(),
            ranks=np.nan_to_num(self._column("rank")).astype(np.int64).tolist(),
            expected=self._expected(decode) if with_expected else None,
            sums=self.sums(),
            word_start_nll=[*self._column("share_nll").tolist(), self._end_share_nll]
            if with_word_starts
            else None,
        )

    def _column(self, name: str) -> np.ndarray:
        """What `TokenStats` has under this name of each id of the text; NaN where not scored."""
        found = np.full(len(self.encoded.ids), np.nan)
        for _, window, stats in self._found:
            values = getattr(stats, name)
            if values is not None:
                found[window.scored] = values.numpy()
        return found[self.encoded.num_prefix :]

    def _expected(self, decode: Callable[[int], str]) -> list[list[tuple[str, float]]]:
        """The likeliest tokens in place of each id of the text, with their nll."""
        expected: list[list[tuple[str, float]]] = [[] for _ in self.encoded.ids]
        for _, window, found in self._found:
            if found.expected_ids is None or found.expected_nll is None:
                continue
            rows = zip(found.expected_ids.tolist(), found.expected_nll.tolist(), strict=True)
            for place, (ids, nll) in zip(window.scored, rows, strict=True):
                expected[place] = list(zip(map(decode, ids), nll, strict=True))
        return expected[self.encoded.num_prefix :]


def decoder(tokenizer) -> Callable[[int], str]:
    """What gives the string of an id; each is decoded once."""
    return functools.cache(lambda token_id: str(tokenizer.decode([token_id])))


def count_scored(
    text: EncodedText, windows: list[Window], rules: Preset, tokenizer
) -> tuple[int, int]:
    """UTF-8 bytes and words of the scored text, or of all of it where the preset counts so."""
    if not windows:
        return 0, 0
    ranges = _scored_ranges(windows)
    all_is_scored = ranges == [(text.num_prefix, len(text.ids))] and not text.truncated
    if rules.counts_whole_text or all_is_scored:
        return len(text.text.encode()), rules.count_words(text.text)
    if text.places is not None:
        parts = [text.text_of(first, stop) for first, stop in ranges]
        # Not of the parts: a character may have both scored and unscored tokens.
        num_bytes = sum(text.num_bytes(first, stop) for first, stop in ranges)
    else:
        parts = [tokenizer.decode(text.ids[first:stop]) for first, stop in ranges]
        num_bytes = sum(len(part.encode()) for part in parts)
    return num_bytes, sum(rules.count_words(part) for part in parts)


def _scored_ranges(windows: list[Window]) -> list[tuple[int, int]]:
    """The ids [first, stop) that the windows score; adjacent ranges are joined."""
    ranges: list[tuple[int, int]] = []
    for window in windows:
        for first, stop in window.ranges:
            if ranges and ranges[-1][1] == first:
                first, _ = ranges.pop()
            ranges.append((first, stop))
    return ranges
