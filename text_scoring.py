"""A model and texts -> the nll of each token, in the order of the texts.

The windows of many texts are sorted by length and packed into batches of few padded tokens, and
texts may be shared out among processes. What that must not change, the result, is put back in order
here.
"""

import functools
import hashlib
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from .heatmap import heatmap
from .identity import quantization_name, tokenizer_id, weights_id
from .options import TextOptions, positive_int, signature
from .processes import ALONE, Processes
from .text_encoding import EncodedText, TextEncoder
from .text_model import LanguageModel, Span
from .text_progress import Progress
from .text_schedule import batches, portions, shares
from .text_windows import Window, check_window
from .totals import TextSums, text_result, token_standard_error


@dataclass
class ScoredText:
    """A text's ids with the nll of each, and the bytes and words that were scored."""

    encoded: EncodedText
    nll: np.ndarray  # (ids,) nats, NaN where not scored
    weights: np.ndarray  # (ids,) 0 where not scored
    scored: np.ndarray  # (ids,) bool
    entropy: np.ndarray  # (ids,) nats, NaN where not scored, or not asked for
    ranks: np.ndarray  # (ids,) 0 where not scored, or not asked for
    num_bytes: int = 0
    num_words: int = 0
    context_truncated: bool = False
    num_open_windows: int = 0  # still to be scored
    expected: dict[int, tuple[list[int], list[float]]] = field(default_factory=dict)

    @classmethod
    def unscored(cls, encoded: EncodedText) -> "ScoredText":
        """Memory for the scores of a text."""
        size = len(encoded.ids)
        return cls(
            encoded,
            nll=np.full(size, np.nan),
            weights=np.zeros(size),
            scored=np.zeros(size, dtype=bool),
            entropy=np.full(size, np.nan),
            ranks=np.zeros(size, dtype=np.int64),
        )

    @property
    def sums(self) -> TextSums:
        """What the result of a corpus needs of it."""
        scored = self.weights > 0  # a preset may give a scored token no weight
        unweighted = self.nll[self.scored]
        return TextSums(
            nll_sum=float(self.nll[scored] @ self.weights[scored]),
            weight_sum=float(self.weights.sum()),
            unweighted_nll_sum=float(unweighted.sum()),
            token_nll_sq_sum=float(unweighted @ unweighted),
            num_tokens=int(scored.sum()),
            num_bytes=self.num_bytes,
            num_words=self.num_words,
            truncated=self.encoded.truncated,
            context_truncated=self.context_truncated,
        )


@dataclass(frozen=True)
class TextScore:
    """A text token by token, for people: the tokens, where they stand, and how surprising each is.

    The offsets cover the text without gaps; a space belongs to the token behind it. Without a fast
    tokenizer they are None. `expected` is None unless asked for.
    """

    text: str
    tokens: list[str]
    offsets: list[tuple[int, int]] | None  # characters [start, end)
    nll: list[float]  # nats; NaN where not scored
    entropy: list[float]  # nats, the nll to be expected before the token came; NaN: not scored
    ranks: list[int]  # 1 + the number of tokens likelier than this; 0: not scored
    expected: list[list[tuple[str, float]]] | None = None  # likeliest tokens, each with its nll

    def _repr_html_(self) -> str:
        """How a notebook shows it."""
        return heatmap(self)


class TextScorer:
    """Scores texts with one model under one set of options."""

    def __init__(self, model: LanguageModel, options: TextOptions):
        self.model, self.options = model, options
        self.encoder = TextEncoder(model.tokenizer, options)
        self.rules = options.rules
        self.window = options.window
        if options.window is None:
            self.window = min(model.context_length, self.rules.longest_window or math.inf)
        if self.window > model.context_length:
            raise ValueError(
                f"window is {self.window} tokens, but the model {model.name} reads at most "
                f"{model.context_length}."
            )
        self.stride = (
            options.stride or self.window // (1 if self.rules.stride_is_window else 2) or 1
        )
        check_window(self.window, self.stride)
        start_id = self.encoder.start_id
        if start_id is not None and start_id >= model.num_embeddings:
            raise ValueError(
                f"The start token is id {start_id}, but the model {model.name} has "
                f"{model.num_embeddings} embeddings. Pass another id to add_start_token, or False."
            )

    @property
    def joins_texts(self) -> bool:
        """Whether the preset makes one text of all."""
        return self.rules.joint is not None

    def signature(self, with_contexts: bool) -> str:
        """Every setting that changes the number, in one line."""
        options = self.options
        settings = {
            "model": self.model.name,
            "weights": weights_id(self.model.model),
            "model_dtype": self.model.dtype,
            "quantization": quantization_name(self.model.model.config),
            "tokenizer": tokenizer_id(self.model.tokenizer),
            "preset": options.preset,
            "start": self.encoder.start_name,
            "max_length": options.max_length,
            "window": self.window,
            "stride": None if "stride" in self.rules.without else self.stride,
            "contexts": options.join_contexts if with_contexts else False,
            "dtype": options.dtype,
            "backend": options.backend,
        }
        return signature(settings)

    def result(
        self, sums: Sequence[TextSums], signature: str, with_contexts: bool
    ) -> dict[str, float | int | str | list[float]]:
        """The result of a corpus as a user gets it, from the sums of its texts."""
        result = text_result(sums)
        if self.options.max_length is None:
            del result["num_truncated"]
        if not with_contexts:
            del result["num_truncated_contexts"]
        if self.rules.tokens_are_independent:
            result["perplexity_standard_error"] = token_standard_error(sums)
        return {**result, "signature": signature}

    def score(
        self,
        texts: Iterable[str],
        contexts: Iterable[str] | None = None,
        *,
        batch_size: int | None = None,
        top_k: int = 0,
        progress: bool | Callable[[int, int], None] = False,
    ) -> Iterator[ScoredText]:
        """Score texts in their order; a generator is read and answered in portions.

        Args:
            texts: the texts. Some presets join them into one.
            contexts: one prompt for each text, which conditions it and is not scored.
            batch_size: the most windows at once, besides the bound on their tokens.
            top_k: keep the `top_k` likeliest tokens at each scored position.
            progress: show a progress bar with tokens per second and the perplexity so far; or a
                function that is called with the numbers of tokens scored and to be scored.

        Raises:
            TypeError: texts or contexts that are not strings.
            ValueError: no texts, contexts that are not as many as the texts or not possible with
                the preset, ids that the model does not have.
        """
        top_k = positive_int(top_k, "top_k", least=0)
        with Progress(progress) as bar:
            for portion in portions(self._pairs(texts, contexts)):
                yield from self._score_portion(portion, batch_size, top_k, bar)

    def sums(
        self,
        texts: Iterable[str],
        contexts: Iterable[str] | None = None,
        *,
        batch_size: int | None = None,
        progress: bool = False,
        processes: Processes = ALONE,
    ) -> Iterator[tuple[str, TextSums]]:
        """Each text with its sums, in the order of the texts.

        Args:
            texts, contexts, batch_size, progress: as for `score`.
            processes: those that all call this with the same texts. Each scores a share of them,
                and gets the sums of all.

        Raises:
            TypeError, ValueError: as `score`; or not all ranks have the same texts and settings.
            ConnectionError: another rank failed, or is gone.
        """
        all_portions = portions(self._pairs(texts, contexts), processes.size)
        with Progress(progress and processes.rank == 0) as bar:
            if processes.size == 1:
                for portion in all_portions:
                    scored = self._score_portion(portion, batch_size, None, bar)
                    yield from ((text.encoded.text, text.sums) for text in scored)
                return
            settings = self.signature(with_contexts=False)
            while (portion := _next_portion(all_portions, settings, processes)) is not None:
                lengths = [len(text) + len(context or "") for text, context in portion]
                shared = shares(lengths, processes.size)
                own = [portion[i] for i in shared[processes.rank]]
                answers = processes.exchange(functools.partial(self._sums, own, batch_size, bar))
                sums = dict(zip(itertools.chain(*shared), itertools.chain(*answers), strict=True))
                for i, (text, _) in enumerate(portion):
                    yield text, sums[i]

    def _sums(self, portion, batch_size, bar) -> list[TextSums]:
        return [text.sums for text in self._score_portion(portion, batch_size, None, bar)]

    def _pairs(self, texts, contexts) -> Iterator[tuple[str, str | None]]:
        """Texts and contexts, checked, and joined where the preset joins them."""
        if contexts is not None and not self.rules.takes_contexts:
            raise ValueError(f'preset="{self.options.preset}" has no contexts.')
        pairs = checked_pairs(texts, contexts)
        if not self.joins_texts:
            return pairs
        joined = self.rules.joint.join(text for text, _ in pairs)
        joined = joined.removesuffix("\n") if self.rules.drops_line_end else joined
        return iter([(joined, None)])

    def _score_portion(
        self,
        portion: list[tuple[str, str | None]],
        batch_size,
        top_k: int | None,
        bar: "Progress",
    ) -> Iterator[ScoredText]:
        """The texts of a portion, each as soon as it and all before it are scored; with top_k None,
        of each token nothing but its nll."""
        if batch_size is not None:
            batch_size = positive_int(batch_size, "batch_size")
        if not portion:  # as the share of one rank may be
            return
        texts, contexts = zip(*portion, strict=True)
        encoded = self.encoder.encode(texts, None if contexts[0] is None else contexts)
        waiting = deque(ScoredText.unscored(text) for text in encoded)
        jobs: list[tuple[ScoredText, Window]] = []
        for result in waiting:
            self.model.check_ids(result.encoded.ids)
            windows = list(self._windows(result.encoded))
            result.num_open_windows = len(windows)
            jobs += [(result, window) for window in windows]
            self._count(result, windows)
        bar.expect(sum(window.stop - window.first for _, window in jobs))
        jobs.sort(key=lambda job: -job[1].num_inputs)  # the longest first: memory runs out early
        launched: list[tuple[list[tuple[ScoredText, Window]], Callable]] = []
        lengths = [window.num_inputs for _, window in jobs]
        most_windows = batch_size if self.model.takes_batches else 1
        for these in batches(
            lengths, self.model.tokens_per_batch, most_windows, self.model.batch_key
        ):
            batch = jobs[these]
            spans = [self._span(result.encoded, window) for result, window in batch]
            options = (self.options.dtype, self.options.backend, top_k)
            launched.append((batch, self.model.launch(spans, *options)))
            if len(launched) == 2:  # an accelerator has the next batch before this one is read
                _collect(*launched.pop(0), bar)
                yield from _finished(waiting)
        for batch, span_results in launched:
            _collect(batch, span_results, bar)
        yield from _finished(waiting)

    def _windows(self, text: EncodedText) -> Iterator[Window]:
        first = max(1, text.num_prefix)
        return self.rules.windows(len(text.ids), self.window, self.stride, first)

    def _span(self, text: EncodedText, window: Window) -> Span:
        ids = text.ids[window.start : window.stop]
        if self.rules.starts_each_window and self.encoder.start_id is not None:
            ids = [self.encoder.start_id, *ids[1:]]
        return Span(ids, window.first - window.start)

    def _count(self, result: ScoredText, windows: list[Window]) -> None:
        """Bytes and words of the text that is scored, or as the preset counts them."""
        text, whole = result.encoded, self.rules.counts_whole_text
        if not windows:
            return
        result.context_truncated = windows[0].start > 0
        ranges: list[list[int]] = []
        for window in windows:
            if ranges and ranges[-1][1] == window.first:
                ranges[-1][1] = window.stop
            else:
                ranges.append([window.first, window.stop])
        all_of_it = ranges == [[text.num_prefix, len(text.ids)]] and not text.truncated
        if whole or all_of_it:
            parts = [text.text]
        elif text.places is not None:
            parts = [text.span(*scored) for scored in ranges]
        else:
            decode = self.model.tokenizer.decode
            parts = [decode(text.ids[first:stop]) for first, stop in ranges]
        result.num_words = sum(self.rules.count_words(part) for part in parts)
        result.num_bytes = sum(len(part.encode()) for part in parts)
        if text.places is not None and not whole:
            # Not of the parts: a character may have tokens that are scored and tokens that are not.
            result.num_bytes = sum(text.num_bytes(*scored) for scored in ranges)

    def describe(self, result: ScoredText, with_expected: bool) -> TextScore:
        """The result for people: without start token and prompt, ids as text."""
        text, begin = result.encoded, result.encoded.num_prefix
        decode = _cached_decoder(self.model.tokenizer)
        offsets = None
        if text.places is not None:
            ends = [0, *text.places.ends[begin:].tolist()]
            if len(ends) > 1 and not text.truncated:
                ends[-1] = len(text.text)
            offsets = list(itertools.pairwise(ends))
        expected = None
        if with_expected:
            expected = [
                [
                    (decode(i), nll)
                    for i, nll in zip(*result.expected.get(at, ((), ())), strict=True)
                ]
                for at in range(begin, len(text.ids))
            ]
        return TextScore(
            text=text.text,
            tokens=[decode(i) for i in text.ids[begin:]],
            offsets=offsets,
            nll=result.nll[begin:].tolist(),
            entropy=result.entropy[begin:].tolist(),
            ranks=result.ranks[begin:].tolist(),
            expected=expected,
        )


def checked_pairs(
    texts: Iterable[str], contexts: Iterable[str] | None
) -> Iterator[tuple[str, str | None]]:
    """Each text with its context, checked as they come.

    Raises:
        TypeError: a text or context that is no string.
        ValueError: no texts at all, not as many contexts as texts, or a text that is no Unicode.
    """
    missing = object()
    if contexts is None:
        pairs = ((text, None) for text in texts)
    else:
        pairs = itertools.zip_longest(texts, contexts, fillvalue=missing)
    number = -1
    for number, (text, context) in enumerate(pairs):
        if text is missing or context is missing:
            raise ValueError(
                "contexts must hold one prompt for each text; there are more "
                f"{'contexts' if text is missing else 'texts'}, beyond {number}."
            )
        _check_text(text, f"predictions[{number}]")
        if contexts is not None:
            _check_text(context, f"contexts[{number}]")
        yield text, context
    if number < 0:
        raise ValueError("predictions holds no texts.")


def _next_portion(
    portions: Iterator[list[tuple[str, str | None]]], settings: str, processes: Processes
) -> list[tuple[str, str | None]] | None:
    """The next portion, None at the end; the same in all processes, or ValueError is raised."""
    portion = None

    def fingerprint() -> str:
        nonlocal portion
        portion = next(portions, None)
        return hashlib.sha256(repr((settings, portion)).encode()).hexdigest()

    if len(set(processes.exchange(fingerprint))) > 1:
        raise ValueError(
            "sync=True: the ranks were given different texts, or different settings. Pass all "
            "texts on every rank; they are shared out here."
        )
    return portion


def _check_text(text, name: str) -> None:
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a string, got {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is no valid Unicode text: {error}.") from None


def _collect(batch: list[tuple[ScoredText, Window]], span_results: Callable, bar: Progress) -> None:
    """Put the nll of a batch into its texts."""
    for (result, window), scored in zip(batch, span_results(), strict=True):
        here = slice(window.first, window.stop)
        result.nll[here] = scored.nll.numpy()
        result.weights[here] = window.weight
        result.scored[here] = True
        if scored.rank is not None:
            result.entropy[here] = scored.entropy.numpy()
            result.ranks[here] = scored.rank.numpy()
        if scored.expected_ids is not None:
            ids, nll = scored.expected_ids.tolist(), scored.expected_nll.tolist()
            for i in range(window.stop - window.first):
                result.expected[window.first + i] = ids[i], nll[i]
        result.num_open_windows -= 1
        bar.add(result.nll[here], window.weight)


def _finished(waiting: deque[ScoredText]) -> Iterator[ScoredText]:
    """The first of the texts, as many as are scored wholly; they leave the queue."""
    while waiting and waiting[0].num_open_windows == 0:
        yield waiting.popleft()


def _cached_decoder(tokenizer):
    cache: dict[int, str] = {}

    def decode(token_id: int) -> str:
        if token_id not in cache:
            cache[token_id] = tokenizer.decode([token_id])
        return cache[token_id]

    return decode
