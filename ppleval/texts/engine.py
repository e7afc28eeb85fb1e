"""A model and texts -> a score for each text, in the order of the texts.

The windows of many texts are sorted by length and packed into batches with little padding, and
several processes may share the texts. Neither changes a result: each window fills its place in its
text's `Draft`.
"""

import copy
import functools
import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple, Self

import torch
from transformers import PreTrainedTokenizerBase

from ppleval.distributed import ALONE, Attempt, Processes, T, naming_lost_ranks
from ppleval.logits.options import positive_int, signature
from ppleval.logits.outputs import TokenStats
from ppleval.models.language_model import LanguageModel, Span
from ppleval.models.pair import ModelPair
from ppleval.stats.positions import bucket_edges
from ppleval.stats.report import TextReport
from ppleval.stats.texts import TextTotals
from ppleval.stats.totals import Result, TextSums
from ppleval.texts.checks import check_scores
from ppleval.texts.conversations import ConversationEncoder
from ppleval.texts.encoding import EncodedText, TextEncoder
from ppleval.texts.inputs import checked_pairs, num_characters
from ppleval.texts.options import TextOptions
from ppleval.texts.progress import Progress
from ppleval.texts.schedule import Portion, batches, portions, shares
from ppleval.texts.score import Draft, TextScore, count_scored
from ppleval.texts.windows import Window, check_window, windows_to_the_end
from ppleval.texts.words import word_start_ids


class Job(NamedTuple):
    """A window to score, and the draft that takes its result."""

    draft: Draft
    window: Window


class Plan(NamedTuple):
    """Texts to score, and the batches of windows in which this is done."""

    drafts: list[Draft]
    batches: list[list[Job]]


class TextScorer:
    """Scores texts with one model under one set of options."""

    new_draft, sums_type = Draft, TextSums

    def __init__(self, model: LanguageModel | ModelPair, options: TextOptions):
        self.model, self.options = model, options
        self.encoder = self._new_encoder()
        self.rules = options.rules
        self._word_starts: torch.Tensor | None = None  # their share is found, too
        longest = min(model.context_length, self.rules.longest_window or model.context_length)
        self.window = longest if options.window is None else options.window
        if self.window > model.context_length:
            raise ValueError(
                f"window is {self.window} tokens, but the model {model.name} reads at most "
                f"{model.context_length}."
            )
        self.stride = (
            options.stride or self.window // (1 if self.rules.stride_is_window else 2) or 1
        )
        check_window(self.window, self.stride)
        self.edges = bucket_edges(options.positions, self.window)
        start_id = self.encoder.start_id
        if start_id is not None and start_id >= model.num_embeddings:
            raise ValueError(
                f"The start token is id {start_id}, but the model {model.name} has "
                f"{model.num_embeddings} embeddings. Pass another id to add_start_token, or False."
            )

    @classmethod
    def check_use(
        cls,
        name: str | None,
        tokenizer: PreTrainedTokenizerBase,
        options: TextOptions,
        with_contexts: bool | None,
    ) -> None:
        """Check what can be told before the model of this name is loaded.

        Args:
            with_contexts: whether texts will have contexts; None where that is not known.

        Raises:
            ValueError: options that this tokenizer, or a model of this kind, does not take.
        """
        encoder_of(tokenizer, options)

    @property
    def starts_each_window(self) -> bool:
        """Whether the start token takes the place of the first id of later windows."""
        return self.options.starts_each_window and self.encoder.start_id is not None

    @property
    def shortened_contexts(self) -> str:
        """How a warning names contexts that the model did not read as a whole."""
        return f"are longer than the window of {self.window} tokens and were cut from the left"

    @property
    def vocab_sizes(self) -> tuple[int, ...]:
        """How many ids each of its models chooses among."""
        return (self.model.vocab_size,)

    @property
    def joins_texts(self) -> bool:
        """Whether the preset joins all texts into one."""
        return self.rules.joint is not None

    def signature(self, with_contexts: bool) -> str:
        """Every setting that changes the number, in one line."""
        return signature(self.settings(with_contexts))

    def settings(self, with_contexts: bool) -> dict[str, str | int | bool | None]:
        """Every setting that changes the number."""
        models = self.model.settings()
        # The logits of a float64 model always take float64.
        is_double = "float64" in (models["model_dtype"], models.get("base_model_dtype"))
        dtype = "float64" if is_double else self.options.dtype
        precision = {"dtype": dtype, "backend": self.options.backend}
        return models | self.reading_settings(with_contexts) | precision

    def reading_settings(self, with_contexts: bool) -> dict[str, str | int | bool | None]:
        """The settings that decide which tokens are scored, and what the model sees of them."""
        return {
            "preset": self.options.preset,
            "start": self.encoder.start_name,
            "start_each_window": self.starts_each_window,
            "max_length": self.options.max_length,
            "window": self.window,
            "stride": None if "stride" in self.rules.without else self.stride,
            "contexts": self.options.join_contexts if with_contexts else False,
            **self.encoder.settings(),
        }

    def result(self, sums: Sequence[TextSums], with_contexts: bool) -> Result:
        """The result of `compute` without its signature, from the sums of texts."""
        result = self.report(with_contexts).result(TextTotals.of(sums))
        return result | {"perplexities": [text.perplexity for text in sums]}

    def report(self, with_contexts: bool) -> TextReport:
        """What the result shows of totals."""
        return TextReport(
            has_max_length=self.options.max_length is not None,
            has_contexts=with_contexts,
            drops_tail=self.rules.drops_tail,
            tokens_are_independent=self.rules.tokens_are_independent,
            edges=self.edges,
            window=self.window,
        )

    def score(
        self,
        texts: Iterable[str],
        contexts: Iterable[str] | None = None,
        *,
        batch_size: int | None = None,
        top_k: int = 0,
        corrected: bool = False,
        progress: bool | Callable[[int, int], None] = False,
    ) -> Iterator[TextScore]:
        """The score of each text, in the order of the texts; a generator is read in portions.

        Args:
            texts: the texts. Some presets join them into one.
            contexts: one prompt for each text, which conditions it and is not scored.
            batch_size: the most windows at once; the number of their tokens is bounded anyway.
            top_k: also give the `top_k` likeliest tokens at each scored position.
            corrected: also give the corrected nll of words, as `text_words.words_of` says.
            progress: True for a progress bar with tokens per second and the perplexity so far; or
                a function, which is called with the number of tokens scored and their total, as
                `Progress` estimates it.

        Raises:
            TypeError: texts or contexts that are not strings.
            ValueError: no texts, more or fewer contexts than texts, a preset without contexts, ids
                that the model does not have, or a model or tokenizer that cannot be corrected for.
        """
        top_k = check_scores(self.options, top_k, corrected)
        decode = functools.cache(lambda token_id: str(self.model.tokenizer.decode([token_id])))
        scorer = self._with_word_starts() if corrected else self
        for draft in scorer.drafts(
            texts, contexts, batch_size=batch_size, top_k=top_k, progress=progress
        ):
            yield draft.score(decode, with_expected=top_k > 0, with_word_starts=corrected)

    def _with_word_starts(self) -> Self:
        scorer = copy.copy(self)
        scorer._word_starts = word_start_ids(self.model)
        return scorer

    def drafts(
        self,
        texts: Iterable[str],
        contexts: Iterable[str] | None = None,
        *,
        batch_size: int | None = None,
        top_k: int | None = None,
        progress: bool | Callable[[int, int], None] = False,
        num_before: int = 0,
    ) -> Iterator[Draft]:
        """The complete draft of each text, in the order of the texts.

        Args:
            texts, contexts, batch_size, top_k, progress: as for `score`. With top_k None only the
                nll of each token is filled in.
            num_before: the number of the first text.

        Raises:
            TypeError, ValueError: as `score`.
        """
        found = portions(self._pairs(texts, contexts))
        for group in self.model.ranks.same:
            found = _agreed_portions(found, self.signature(with_contexts=False), group)
        with Progress(progress, self._num_texts(texts)) as bar:
            for plan, num_passes in self._plans(found, num_before, batch_size):
                bar.begin(len(plan.drafts))
                yield from self._complete_drafts(plan, num_passes, top_k, bar)

    def sums(
        self,
        texts: Iterable[str],
        contexts: Iterable[str] | None = None,
        *,
        batch_size: int | None = None,
        progress: bool = False,
        num_before: int = 0,
        processes: Processes = ALONE,
    ) -> Iterator[tuple[str, TextSums]]:
        """Each text with its sums, in the order of the texts.

        Args:
            texts, contexts, batch_size, progress: as for `score`.
            num_before: the number of the first text.
            processes: all of them call this with the same texts. Each copy of the model scores a
                share, and each process gets the sums of all texts.

        Raises:
            TypeError, ValueError: as `score`; or the ranks have different texts or settings.
            ConnectionError: another rank failed, or is gone.
        """
        if processes.size == 1:
            for draft in self.drafts(
                texts, contexts, batch_size=batch_size, progress=progress, num_before=num_before
            ):
                yield draft.encoded.given, draft.sums()
            return
        copies = self.model.ranks.copies(processes)
        (own,) = (i for i, copy in enumerate(copies) if processes.rank in copy)
        found = portions(self._pairs(texts, contexts), len(copies))
        settings = self.signature(with_contexts=False)
        for group in self.model.ranks.same_beyond(processes):
            share = f"{settings}, share {own} of {len(copies)}"
            found = _agreed_portions(found, share, group)
        with Progress(progress and processes.rank == 0, self._num_texts(texts)) as bar:
            for portion in _agreed_portions(found, settings, processes):
                bar.begin(len(portion))
                lengths = [num_characters(text) + len(context or "") for text, context in portion]
                shared = shares(lengths, len(copies))
                share = [portion[i] for i in shared[own]], [num_before + i for i in shared[own]]
                num_before += len(portion)
                plan = processes.attempt(self._plan, *share, batch_size)
                scored = self._sums_of_share(plan, bar, processes)
                everyone = processes.gather(scored)
                # The ranks of one copy have the same texts; one of them answers.
                answers = itertools.chain(*(everyone[copy[0]] for copy in copies))
                sums = dict(zip(itertools.chain(*shared), answers, strict=True))
                for i, (text, _) in enumerate(portion):
                    yield text, sums[i]

    def portion_sums(
        self,
        texts: Iterable[str],
        contexts: Iterable[str] | None = None,
        *,
        batch_size: int | None = None,
    ) -> list[TextSums]:
        """As `sums`, of few enough texts to be packed into batches all at once."""
        portion = list(self._pairs(texts, contexts))
        plan = self._plan(portion, range(len(portion)), batch_size)
        with Progress(False) as bar:
            return self._sums_of(plan, 0, bar)

    def _sums_of(self, plan: Plan, num_passes: int, bar: Progress) -> list[TextSums]:
        return [draft.sums() for draft in self._complete_drafts(plan, num_passes, None, bar)]

    def _sums_of_share(
        self, plan: Attempt[Plan], bar: Progress, processes: Processes
    ) -> Attempt[list[TextSums]]:
        """The sums of the texts of a plan, once all processes that have to score it can."""
        ranks = self.model.ranks
        if ranks.is_alone:
            return processes.attempt(lambda: self._sums_of(plan.value, 0, bar))
        # A rank that fails in a forward pass leaves others waiting there, so it must not wait for
        # these in turn: what fails before does so on all, and what fails there ends this rank.
        most = processes.attempt(ranks.in_step.largest, plan.then(lambda plan: len(plan.batches)))
        num_passes = processes.require_all(most)
        return Attempt(self._sums_of(plan.value, num_passes, bar))

    def _plans(
        self, found: Iterator[Portion], num_before: int, batch_size: int | None
    ) -> Iterator[tuple[Plan, int]]:
        """What to score of each portion, and in how many forward passes.

        Processes in step with this one all get as many passes as the one that needs most, and empty
        plans until all have come to the end.
        """
        in_step = self.model.ranks.in_step
        while True:
            mine = in_step.attempt(self._next_plan, found, num_before, batch_size)
            most = in_step.largest(
                mine.then(lambda plan: 0 if plan is None else 1 + len(plan.batches))
            )
            if most == 0:
                return
            plan = mine.value or Plan([], [])
            num_before += len(plan.drafts)
            yield plan, most - 1

    def _next_plan(
        self, found: Iterator[Portion], num_before: int, batch_size: int | None
    ) -> Plan | None:
        portion = next(found, None)
        if portion is None:
            return None
        return self._plan(portion, range(num_before, num_before + len(portion)), batch_size)

    def _num_texts(self, texts: Iterable[str]) -> int | None:
        """How many texts there are to score; None if it is not known before they are read."""
        if self.joins_texts:
            return 1
        return len(texts) if isinstance(texts, Collection) else None

    def _pairs(self, texts, contexts) -> Iterator[tuple[str, str | None]]:
        """Each text with its context, checked; one joined text where the preset joins them."""
        self.options.check_use(with_contexts=contexts is not None)
        pairs = checked_pairs(texts, contexts, self.options.conversations)
        if self.rules.joint is None:
            return pairs
        joined = self.rules.joint.join(text for text, _ in pairs)
        joined = joined.removesuffix("\n") if self.rules.drops_line_end else joined
        return iter([(joined, None)])

    def _plan(self, portion: Portion, numbers: Sequence[int], batch_size: int | None) -> Plan:
        """The texts of a portion, cut into windows, and the batches in which these are scored."""
        if batch_size is not None:
            batch_size = positive_int(batch_size, "batch_size")
        drafts = list(self._drafts(portion, numbers))
        jobs = [Job(draft, window) for draft in drafts for window in draft.windows]
        # The longest first: if memory runs out, it does so early.
        jobs.sort(key=lambda job: -self._num_inputs(job))
        lengths = [self._num_inputs(job) for job in jobs]
        most_windows = batch_size if self.model.takes_batches else 1
        model = self.model
        found = batches(lengths, model.tokens_per_batch, most_windows, model.batch_key)
        return Plan(drafts, [jobs[these] for these in found])

    def _complete_drafts(
        self, plan: Plan, num_passes: int, top_k: int | None, bar: Progress
    ) -> Iterator[Draft]:
        """The texts of a plan, each as soon as it and all before it are scored.

        Args:
            num_passes: how many forward passes to make at least.
        """
        waiting = deque(plan.drafts)
        jobs = itertools.chain(*plan.batches)
        bar.expect(sum(len(window.scored) for _, window in jobs))
        for results in self._results(plan.batches, top_k):
            for (draft, window), found in results:
                draft.fill(window, found)
                bar.add(found.nll.numpy()[: len(window.scored)], window.weight)
            bar.show()
            while waiting and waiting[0].is_complete:
                yield waiting.popleft()
        if not plan.batches:
            bar.show()
        for _ in range(num_passes - len(plan.batches)):
            self._pass(self.model.keep_step)
        yield from waiting  # without any window

    def _drafts(self, portion: Portion, numbers: Sequence[int]) -> Iterator[Draft]:
        """Each text of a portion, encoded and cut into windows."""
        for number, text in zip(numbers, self._encoded(portion), strict=True):
            self.model.check_ids(text.ids)
            windows = list(self._windows(text))
            counts = count_scored(text, windows, self.rules, self.model.tokenizer)
            dropped = len(text.ids) - windows[-1].stop if self.rules.drops_tail else 0
            yield self.new_draft(number, text, windows, *counts, self.edges, dropped)

    def _encoded(self, portion: Portion) -> Iterable[EncodedText]:
        """Each text of a portion with its ids."""
        if not portion:  # a rank may have no share
            return []
        texts, contexts = zip(*portion, strict=True)
        return self.encoder.encode(texts, None if contexts[0] is None else contexts)

    def _results(
        self, batches: list[list[Job]], top_k: int | None
    ) -> Iterator[Iterator[tuple[Job, TokenStats]]]:
        """The jobs with their results, batch by batch."""
        running: deque[tuple[list[Job], Callable[[], Sequence[TokenStats]]]] = deque()
        for jobs in batches:
            spans = [self._span(job) for job in jobs]
            running.append((jobs, self._pass(self._launch, spans, top_k)))
            if len(running) == 2:  # an accelerator gets the next batch before this one is read
                batch, results = running.popleft()
                yield zip(batch, self._pass(results), strict=True)
        for batch, results in running:
            yield zip(batch, self._pass(results), strict=True)

    def _pass(self, function: Callable[..., T], *args) -> T:
        """Call a function that runs the model; an error says whether another rank is gone."""
        if self.model.ranks.is_alone:
            return function(*args)
        with naming_lost_ranks():
            return function(*args)

    def _launch(
        self, spans: Sequence[Span], top_k: int | None
    ) -> Callable[[], Sequence[TokenStats]]:
        arguments = spans, self.options.dtype, self.options.backend, top_k
        if self._word_starts is None:
            return self.model.launch(*arguments)
        assert isinstance(self.model, LanguageModel)  # as word_start_ids says
        return self.model.launch(*arguments, self._word_starts)

    def _new_encoder(self) -> TextEncoder:
        return encoder_of(self.model.tokenizer, self.options)

    def _windows(self, text: EncodedText) -> Iterable[Window]:
        def cut(num_ids: int, first: int) -> Iterator[Window]:
            return self.rules.windows(num_ids, self.window, self.stride, first)

        windows = text.windows(cut)
        if self._word_starts is None:
            return windows
        ends = self.window, self.model.batch_key
        return windows_to_the_end(list(windows), len(text.ids), *ends)

    def _num_inputs(self, job: Job) -> int:
        return job.window.num_inputs

    def _span(self, job: Job) -> Span:
        (draft, window), ids = job, job.draft.encoded.ids
        inputs = ids[window.start : window.start + window.num_inputs]
        if self.starts_each_window and self.encoder.start_id is not None:
            inputs[0] = self.encoder.start_id
        rows: list[int] = []
        targets: list[int] = []
        for first, stop in window.ranges:
            rows += range(first - window.start - 1, stop - window.start - 1)
            targets += ids[first:stop]
        if window.reads_end:
            rows.append(window.num_inputs - 1)
            targets.append(ids[-1])  # any, because its nll is not looked at
        return Span(inputs, rows, targets, (draft.number, window.first))


def encoder_of(tokenizer: PreTrainedTokenizerBase, options: TextOptions) -> TextEncoder:
    """What encodes texts, or conversations, as the options say."""
    return (ConversationEncoder if options.conversations else TextEncoder)(tokenizer, options)


def _agreed_portions(
    portions: Iterator[Portion], settings: str, processes: Processes
) -> Iterator[Portion]:
    """The portions, each once all ranks are known to have the same one and the same settings.

    Raises:
        ValueError: the portions or the settings of the ranks differ.
        ConnectionError: another rank failed, or is gone.
    """
    with_settings = ((settings, portion) for portion in portions)
    while True:
        mine: Attempt[tuple[str, Portion] | None] = processes.attempt(next, with_settings, None)
        agreed = processes.require_equal(
            mine,
            "The ranks were given different texts, or different settings. Pass the same ones on "
            "every rank: sync=True shares them out, and ranks that hold one model together read "
            "them together.",
        )
        if agreed is None:  # the end
            return
        yield agreed[1]
