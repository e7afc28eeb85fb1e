"""Texts and a model -> a base on disk, to compare it with a model that does not fit beside it."""

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch

from ppleval.logits.output_layer import launch_rows
from ppleval.logits.outputs import TokenStats
from ppleval.logits.product import Product
from ppleval.models.language_model import LanguageModel, Span
from ppleval.models.output_head import OutputLayer
from ppleval.models.saved_base import BaseWriter
from ppleval.texts.engine import TextScorer
from ppleval.texts.options import TextOptions
from ppleval.texts.progress import Progress
from ppleval.texts.schedule import portions
from ppleval.texts.score import Draft


@dataclass(frozen=True, kw_only=True)
class SavedStats(TokenStats):
    """The nll of some tokens, and what is kept of them."""

    rows: torch.Tensor  # (n, hidden_size) that enter the output layer, or logits (n, V)


class SavedDraft(Draft):
    """What is kept of a text, filled window by window with `SavedStats`."""

    def saved(self) -> tuple[Sequence[int], np.ndarray, torch.Tensor]:
        """What `BaseWriter.add` takes."""
        found = sorted(self._found)
        scored = [np.asarray(window.scored) for _, window, _ in found]
        rows = [stats.rows for _, _, stats in found if isinstance(stats, SavedStats)]
        if not rows:  # no token to score
            return self.encoded.ids, np.zeros(0, dtype=np.int64), torch.zeros(0)
        return self.encoded.ids, np.concatenate(scored), torch.cat(rows)


class TextSaver(TextScorer):
    """Saves what a model makes of texts, under one set of options.

    Raises:
        ValueError: as `TextScorer`, or a model that several processes hold together.
    """

    new_draft = SavedDraft

    def __init__(self, model: LanguageModel, options: TextOptions):
        if not model.ranks.is_alone:
            raise ValueError(
                "save_base takes a model that one process holds as a whole, but several hold "
                f"{model.name} together."
            )
        super().__init__(model, options)
        self._language_model = model

    def save(
        self,
        path: str | os.PathLike,
        texts: Iterable[str],
        contexts: Iterable[str] | None = None,
        *,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> int:
        """Write the base of these texts; the texts that are there already are not scored again.

        Returns:
            The number of texts in it.

        Raises:
            TypeError, ValueError: as `score`; or there is something else at `path`, a base of other
                settings or texts, or a damaged one.
            OSError: the disk is full, or cannot be written to; what is complete stays.
        """
        writer = self._writer(path, with_contexts=contexts is not None)
        head = self._language_model.head
        known, number = writer.known, 0
        with closing(Progress(progress, self._num_texts(texts))) as bar:
            for portion in portions(self._pairs(texts, contexts)):
                num_known = max(0, min(len(portion), writer.num_texts - number))
                if known is not None:
                    for i, text in enumerate(self.reader.encode(portion[:num_known])):
                        known.check_text(number + i, text.ids)
                numbers = range(number + num_known, number + len(portion))
                plan = self.plan(portion[num_known:], numbers, batch_size)
                bar.begin(len(portion), plan.num_tokens)
                for draft in self.score_plan(plan, self._launch, bar):
                    assert isinstance(draft, SavedDraft)  # because of new_draft
                    self._check_head(head, path)
                    writer.add(*draft.saved())
                number += len(portion)
                writer.flush()
        if number < writer.num_texts:
            raise ValueError(f"The base at {path} is of {writer.num_texts} texts, not {number}.")
        writer.finish()
        return number

    def _check_head(self, head: OutputLayer | None, path: str | os.PathLike) -> None:
        """Raises ValueError if the output layer was given up, so that rows are now of two kinds."""
        if self._language_model.head is not head:
            raise ValueError(
                f"The output layer of {self._language_model.name} cannot be used alone for all of "
                f"these texts, so its logits have to be kept. Delete {path}, and save the base "
                "again."
            )

    def _writer(self, path: str | os.PathLike, with_contexts: bool) -> BaseWriter:
        model = self._language_model
        with model.running():  # one token shows what kind of output layer there is
            outputs = model.read([Span([0], [0], [0])])
        return BaseWriter(
            path,
            model=self.model.settings(),
            reading=self.reader.settings(with_contexts),
            layer=outputs.to_logits if isinstance(outputs.to_logits, Product) else None,
            transform=outputs.transform,
            vocab_size=outputs.vocab_size,
        )

    def _launch(self, spans: Sequence[Span]) -> Callable[[], Sequence[SavedStats]]:
        """Start to score a batch of spans, and to read what is kept of them."""
        with self._language_model.running():
            outputs = self._language_model.read(spans)
            reduction = launch_rows(outputs, dtype=self.options.dtype, backend=self.options.backend)
            rows = outputs.rows[outputs.positions]
            if not isinstance(outputs.to_logits, Product):
                rows = outputs.to_logits(rows)

        def results() -> list[SavedStats]:
            stats, host_rows = reduction.on_host(rows)
            saved = SavedStats(nll=stats.nll, rows=host_rows)
            return saved.split([len(span.targets) for span in spans])

        return results
