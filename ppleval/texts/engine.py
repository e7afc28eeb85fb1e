"""A model and texts -> a score for each text, in the order of the texts.

The windows of many texts are sorted by length and packed into batches with little padding, and
several processes may share the texts (sharing.py). Neither changes a result: each window fills its
place in its text's `Draft`. How a kind of model reads a text is its reader's business.
"""

import functools
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing
from operator import attrgetter

import torch

from ppleval.distributed import ALONE, Processes
from ppleval.logits.options import positive_int, signature
from ppleval.logits.outputs import TokenStats
from ppleval.models.kinds import CausalModel, MaskedModel, Seq2SeqModel
from ppleval.models.language_model import LanguageModel, Span
from ppleval.models.pair import ModelPair, ScoredModel
from ppleval.stats.positions import bucket_edges
from ppleval.stats.texts import TextReport, TextTotals
from ppleval.stats.totals import Result, TextSums
from ppleval.texts.checks import check_scores
from ppleval.texts.encoder_decoder import Seq2SeqReader
from ppleval.texts.encoding import EncodedText
from ppleval.texts.inputs import checked_pairs
from ppleval.texts.masked import MaskedReader
from ppleval.texts.options import TextOptions
from ppleval.texts.pairs import PairReader
from ppleval.texts.progress import Progress
from ppleval.texts.reading import TextReader
from ppleval.texts.schedule import Job, Plan, Portion, batches, portions
from ppleval.texts.score import Draft, TextScore, count_scored, decoder
from ppleval.texts.sharing import drafts_in_step, shared_sums
from ppleval.texts.windows import windows_to_the_end
from ppleval.texts.words import word_start_ids

# What reads texts for each kind of model.
READERS: dict[type, type[TextReader]] = {
    CausalModel: TextReader,
    MaskedModel: MaskedReader,
    Seq2SeqModel: Seq2SeqReader,
    ModelPair: PairReader,
}
# Starts to score a batch of spans; a call of what it returns gives the results.
Launch = Callable[[Sequence[Span]], Callable[[], Sequence[TokenStats]]]


def kinds_for(options: TextOptions) -> tuple[type[LanguageModel], ...]:
    """The kinds of models that these options are for."""
    return (CausalModel, Seq2SeqModel) if options.pseudo is None else (MaskedModel,)


class TextScorer:
    """Scores texts with one model under one set of options.

    Raises:
        ValueError: options that do not go with this model.
    """

    new_draft, sums_type = Draft, TextSums

    def __init__(self, model: ScoredModel, options: TextOptions):
        self.model, self.options, self.rules = model, options, options.rules
        self.reader = READERS[type(model)](model, options)
        self.encoder, self.window = self.reader.encoder, self.reader.window
        self.edges = bucket_edges(options.positions, self.window)
        # Of each token its nll alone, unless more is asked for.
        self.launch = functools.partial(model.launch, dtype=options.dtype, backend=options.backend)

    @property
    def shortened_contexts(self) -> str:
        """How a warning names contexts that the model did not read as a whole."""
        return self.reader.shortened_contexts

    @property
    def vocab_sizes(self) -> tuple[int, ...]:
        """How many ids each of its models chooses among."""
        return (self.model.vocab_size,)

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
        return models | self.reader.settings(with_contexts) | precision

    def result(self, sums: Sequence[TextSums], with_contexts: bool) -> Result:
        """The result of `compute` without its signature, from the sums of texts."""
        result = self.report(with_contexts).result(TextTotals.of(sums))
        return result | {"perplexities": list(map(attrgetter("perplexity"), sums))}

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
            corrected: also give the corrected nll of words, as `words.words_of` says.
            progress: True for a progress bar with tokens per second and the perplexity so far; or
                a function, which is called with the number of tokens scored and their total, as
                `Progress` estimates it.

        Raises:
            TypeError: texts or contexts that are not strings.
            ValueError: no texts, more or fewer contexts than texts, a preset without contexts, ids
                that the model does not have, or a model or tokenizer that cannot be corrected for.
        """
        top_k = check_scores(self.options, top_k, corrected)
        decode = decoder(self.model.tokenizer)
        word_starts = word_start_ids(self.model) if corrected else None
        for draft in self.drafts(
            texts,
            contexts,
            batch_size=batch_size,
            top_k=top_k,
            word_starts=word_starts,
            progress=progress,
        ):
            yield draft.score(decode, with_expected=top_k > 0, with_word_starts=corrected)

    def drafts(
        self,
        texts: Iterable[str],
        contexts: Iterable[str] | None = None,
        *,
        batch_size: int | None = None,
        top_k: int | None = None,
        word_starts: torch.Tensor | None = None,
        progress: bool | Callable[[int, int], None] = False,
        num_before: int = 0,
    ) -> Iterator[Draft]:
        """The complete draft of each text, in the order of the texts.

        Args:
            texts, contexts, batch_size, top_k, progress: as for `score`. With top_k None only the
                nll of each token is filled in.
            word_starts: ids that begin a word; how likely one of them was is filled in, too, also
                behind the last token.
            num_before: the number of the first text.

        Raises:
            TypeError, ValueError: as `score`.
        """
        found = portions(self._pairs(texts, contexts))
        launch = functools.partial(self.launch, top_k=top_k, share_of=word_starts)
        to_the_end = word_starts is not None
        with closing(Progress(progress, self._num_texts(texts))) as bar:
            if not self.model.ranks.is_alone:
                yield from drafts_in_step(
                    self, found, num_before, batch_size, to_the_end, launch, bar
                )
                return
            for portion in found:
                numbers = range(num_before, num_before := num_before + len(portion))
                plan = self.plan(portion, numbers, batch_size, to_the_end)
                bar.begin(len(portion), plan.num_tokens)
                yield from self.score_plan(plan, launch, bar)

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
        found = portions(self._pairs(texts, contexts), len(copies))
        with closing(Progress(progress and processes.rank == 0, self._num_texts(texts))) as bar:
            yield from shared_sums(self, found, num_before, batch_size, processes, copies, bar)

    def portion_sums(
        self,
        texts: Iterable[str],
        contexts: Iterable[str] | None = None,
        *,
        batch_size: int | None = None,
    ) -> list[TextSums]:
        """The sums of few enough texts to be packed into batches all at once.

        Args, Raises: as for `sums`.
        """
        portion = list(self._pairs(texts, contexts))
        plan = self.plan(portion, range(len(portion)), batch_size)
        with closing(Progress(False)) as bar:
            return [draft.sums() for draft in self.score_plan(plan, self.launch, bar)]

    def _num_texts(self, texts: Iterable[str]) -> int | None:
        """How many texts there are to score; None if it is not known before they are read."""
        if self.rules.joint is not None:
            return 1
        return len(texts) if isinstance(texts, Collection) else None

    def _pairs(self, texts, contexts) -> Iterator[tuple[str, str | None]]:
        """Each text with its context, checked; one joined text where the preset joins them."""
        self.reader.check_contexts(contexts is not None)
        pairs = checked_pairs(texts, contexts, self.options.conversations)
        if self.rules.joint is None:
            return pairs
        joined = self.rules.joint.join(text for text, _ in pairs)
        joined = joined.removesuffix("\n") if self.rules.drops_line_end else joined
        return iter([(joined, None)])

    def plan(
        self,
        portion: Portion,
        numbers: Sequence[int],
        batch_size: int | None,
        to_the_end: bool = False,
    ) -> Plan:
        """The texts of a portion, cut into windows, and the batches in which these are scored.

        Args:
            numbers: those of the texts, among all.
            to_the_end: whether a window of each text also reads its last id.
        """
        if batch_size is not None:
            batch_size = positive_int(batch_size, "batch_size")
        drafts: list[Draft] = []
        jobs: list[Job] = []
        num_tokens = 0
        for number, text in zip(numbers, self.reader.encode(portion), strict=True):
            draft = self._new_draft(number, text, to_the_end)
            drafts.append(draft)
            for window in draft.windows:
                jobs.append(Job(draft, window, self.reader.num_inputs(text, window)))
                num_tokens += len(window.scored)
        # The longest first: if memory runs out, it does so early.
        jobs.sort(key=attrgetter("num_inputs"), reverse=True)
        model = self.model
        most_windows = batch_size if model.takes_batches else 1
        found = batches(jobs, model.tokens_per_batch, most_windows, model.batch_key)
        return Plan(drafts, list(found), num_tokens)

    def _new_draft(self, number: int, text: EncodedText, to_the_end: bool) -> Draft:
        self.model.check_ids(text.ids)
        windows = list(self.reader.windows(text))
        if to_the_end:
            num_ids, key = len(text.ids), self.model.batch_key
            windows = windows_to_the_end(windows, num_ids, self.window, key)
        counts = count_scored(text, windows, self.rules, self.model.tokenizer)
        dropped = len(text.ids) - windows[-1].stop if self.rules.drops_tail else 0
        return self.new_draft(number, text, windows, *counts, self.edges, dropped)

    def score_plan(
        self, plan: Plan, launch: Launch, bar: Progress, num_passes: int = 0
    ) -> Iterator[Draft]:
        """The texts of a plan, each as soon as it and all before it are scored.

        Args:
            launch: runs the model on a batch.
            num_passes: how many forward passes to make at least.
        """
        waiting = deque(plan.drafts)
        for jobs, results in self._results(plan.batches, launch):
            for (draft, window, _), found in zip(jobs, results, strict=True):
                draft.fill(window, found)
                bar.add(found.nll.numpy()[: len(window.scored)], window.weight)
            bar.show()
            while waiting and waiting[0].is_complete:
                yield waiting.popleft()
        if not plan.batches:
            bar.show()
        for _ in range(num_passes - len(plan.batches)):
            self.model.keep_step()
        yield from waiting  # without any window

    def _results(
        self, batches: list[list[Job]], launch: Launch
    ) -> Iterator[tuple[list[Job], Sequence[TokenStats]]]:
        """The jobs with their results, batch by batch."""
        running: deque[tuple[list[Job], Callable[[], Sequence[TokenStats]]]] = deque()
        for jobs in batches:
            spans = []
            for draft, window, _ in jobs:
                spans.append(self.reader.span(draft.number, draft.encoded, window))
            running.append((jobs, launch(spans)))
            if len(running) == 2:  # an accelerator gets the next batch before this one is read
                batch, results = running.popleft()
                yield batch, results()
        for batch, results in running:
            yield batch, results()
