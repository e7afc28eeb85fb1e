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
from typing import NamedTuple

from .identity import quantization_name, tokenizer_id, weights_id
from .options import TextOptions, positive_int, signature
from .processes import ALONE, Processes
from .text_encoding import EncodedText, TextEncoder
from .text_model import LanguageModel, ScoredSpan, Span
from .text_progress import Progress
from .text_schedule import batches, portions, shares
from .text_score import Draft, TextScore, count_scored
from .text_windows import Window, check_window
from .totals import TextSums, text_result, token_standard_error


class Job(NamedTuple):
    """A window to score, and the draft that takes its result."""

    draft: Draft
    window: Window


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
    ) -> Iterator[TextScore]:
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
        decode = functools.cache(lambda token_id: self.model.tokenizer.decode([token_id]))
        with Progress(progress) as bar:
            for portion in portions(self._pairs(texts, contexts)):
                for draft in self._complete_drafts(portion, batch_size, top_k, bar):
                    yield draft.score(decode, with_expected=top_k > 0)

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
                    for draft in self._complete_drafts(portion, batch_size, None, bar):
                        yield draft.encoded.text, draft.sums()
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
        return [draft.sums() for draft in self._complete_drafts(portion, batch_size, None, bar)]

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

    def _complete_drafts(
        self,
        portion: list[tuple[str, str | None]],
        batch_size: int | None,
        top_k: int | None,
        bar: Progress,
    ) -> Iterator[Draft]:
        """The texts of a portion, each as soon as it and all before it are scored.

        With top_k None nothing but the nll of each token is filled in.
        """
        if batch_size is not None:
            batch_size = positive_int(batch_size, "batch_size")
        waiting = deque(self._drafts(portion))
        jobs = [Job(draft, window) for draft in waiting for window in draft.windows]
        bar.expect(sum(window.stop - window.first for _, window in jobs))
        for results in self._results(jobs, batch_size, top_k):
            for (draft, window), found in results:
                draft.fill(window, found)
                bar.add(draft.nll[window.first : window.stop], window.weight)
            while waiting and waiting[0].is_complete:
                yield waiting.popleft()
        yield from waiting  # without any window

    def _drafts(self, portion: list[tuple[str, str | None]]) -> Iterator[Draft]:
        """Each text of a portion, encoded and cut into windows."""
        if not portion:  # as the share of one rank may be
            return
        texts, contexts = zip(*portion, strict=True)
        for text in self.encoder.encode(texts, None if contexts[0] is None else contexts):
            self.model.check_ids(text.ids)
            windows = list(self._windows(text))
            yield Draft(
                text, windows, *count_scored(text, windows, self.rules, self.model.tokenizer)
            )

    def _results(
        self, jobs: list[Job], batch_size: int | None, top_k: int | None
    ) -> Iterator[Iterator[tuple[Job, ScoredSpan]]]:
        """The results of one batch after the other, each with its job."""
        jobs = sorted(jobs, key=lambda job: -job.window.num_inputs)  # memory runs out early
        lengths = [window.num_inputs for _, window in jobs]
        most_windows = batch_size if self.model.takes_batches else 1
        running: deque[tuple[list[Job], Callable[[], list[ScoredSpan]]]] = deque()
        for these in batches(
            lengths, self.model.tokens_per_batch, most_windows, self.model.batch_key
        ):
            spans = [self._span(draft.encoded, window) for draft, window in jobs[these]]
            results = self.model.launch(spans, self.options.dtype, self.options.backend, top_k)
            running.append((jobs[these], results))
            if len(running) == 2:  # an accelerator has the next batch before this one is read
                batch, results = running.popleft()
                yield zip(batch, results(), strict=True)
        for batch, results in running:
            yield zip(batch, results(), strict=True)

    def _windows(self, text: EncodedText) -> Iterator[Window]:
        first = max(1, text.num_prefix)
        return self.rules.windows(len(text.ids), self.window, self.stride, first)

    def _span(self, text: EncodedText, window: Window) -> Span:
        ids = text.ids[window.start : window.stop]
        if self.rules.starts_each_window and self.encoder.start_id is not None:
            ids = [self.encoder.start_id, *ids[1:]]
        return Span(ids, window.first - window.start)


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
