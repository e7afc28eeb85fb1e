"""The evaluation that a batch belongs to, and the examples in it. No logits, no sums.

Trainer gives its hooks the outputs and the labels of a batch only. Of which evaluation, dataloader
and model they are is read off the stack. accelerate repeats examples so that every process gets
equally many, and Trainer drops rows that it takes for these.
"""

import sys
from collections.abc import Callable, Sized
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
from torch.utils.data import BatchSampler, DataLoader

from ppleval.distributed import Attempt, Processes


@dataclass(frozen=True)
class EvalLoop:
    """A run of Trainer's `evaluation_loop`, from which the hooks are called.

    accelerate tells the dataloader that began last, which may be that of the training, or one that
    a callback has begun in between. Those on the stack are the evaluation's own.
    """

    key: int  # differs among the loops that run
    trainer: Any
    dataloader: Any  # what get_eval_dataloader has returned
    step: int  # the number of the batch, from 0

    @classmethod
    def running(cls) -> "list[EvalLoop]":
        """The loops that this is called from, the innermost first; none without a Trainer."""
        frame, loops = sys._getframe(1), []
        while frame is not None:
            code = frame.f_code
            names = {*code.co_varnames, *code.co_cellvars}
            if code.co_name == "evaluation_loop" and {"self", "dataloader", "step"} <= names:
                loops.append(cls._of(frame))
            frame = frame.f_back
        return loops

    @classmethod
    def _of(cls, frame: FrameType) -> "EvalLoop":
        variables = frame.f_locals
        loop = cls(id(frame), variables["self"], variables["dataloader"], variables["step"])
        if sys.version_info < (3, 13):
            # subtle: here they are a copy that lives as long as the loop, and keeps logits alive.
            variables.clear()
        return loop

    @property
    def torch_dataloader(self) -> DataLoader | None:
        """The dataloader, or one that the user's own iterable holds; None if there is none."""
        held = getattr(self.dataloader, "__dict__", {}).values()
        return next((a for a in (self.dataloader, *held) if isinstance(a, DataLoader)), None)

    @property
    def is_last(self) -> bool | None:
        """Whether the batch is the last; None if unknown."""
        dataloader = self.torch_dataloader
        if dataloader is None:
            return None
        is_last = getattr(dataloader, "end_of_dataloader", None)  # as accelerate's have
        sampler = _torch_sampler(dataloader)
        is_counted = sampler is not None and isinstance(sampler.sampler, Sized)
        # Classes of the user's own may give another number of batches than they say.
        if is_counted and (is_last is not None or type(dataloader) is DataLoader):
            is_last = self.step + 1 == len(dataloader)
        # Their iterables may end before the dataloader that they hold.
        return is_last if dataloader is self.dataloader else is_last or None


@dataclass(frozen=True)
class EvalBatch:
    """One batch on this process."""

    number: int  # how many batches this process has evaluated before
    dataloader: DataLoader | None  # the one in use; None if unknown
    is_prepared: bool  # whether accelerate divides it among the processes
    is_last: bool | None  # None if unknown
    remainder: int  # examples in the last batch, over all processes; -1 if unknown or not the last
    num_kept: int | None  # how many of all processes' rows Trainer keeps; None for all
    kept_for_another: bool  # whether it counts by another dataloader
    num_processes: int  # that read different examples
    process_index: int  # among these
    num_copies: int = 1  # processes that read the same examples, for one model that they share
    is_counted: bool = True  # one of these is

    @classmethod
    def read(cls, number: int, loop: EvalLoop | None, processes: Processes | None) -> "EvalBatch":
        """The batch that is evaluated now.

        Args:
            number: how many came before.
            loop: the one that evaluates it; None without a Trainer.
            processes: those that read different examples; None for what accelerate says.
        """
        # Every Trainer has accelerate; the rest of the metric does without.
        from accelerate.state import AcceleratorState, GradientState, PartialState

        gradient, ranks = GradientState(), PartialState()
        if processes is None:
            # Tensor and context parallelism, whose ranks stand side by side.
            parallel = AcceleratorState._shared_state.get("parallelism_config")
            copies = 1 if parallel is None else parallel.tp_size * parallel.cp_size
            num_processes, index = ranks.num_processes // copies, ranks.process_index // copies
            is_counted = ranks.process_index % copies == 0
        else:
            copies = ranks.num_processes // processes.size
            num_processes, index = processes.size, processes.rank
            is_counted = 0 in processes.members
        active = gradient.active_dataloader
        num_kept = remainder = gradient.remainder if gradient.end_of_dataloader else -1
        if loop is None:
            dataloader, is_prepared = active, active is not None
            is_last = gradient.end_of_dataloader
        else:
            dataloader, is_last = loop.torch_dataloader, loop.is_last
            remainder = getattr(dataloader, "remainder", -1)
            is_prepared = hasattr(dataloader, "remainder")
        return cls(
            number=number,
            dataloader=dataloader,
            is_prepared=is_prepared,
            is_last=is_last,
            remainder=remainder if is_last else -1,
            num_kept=num_kept if num_kept > 0 else None,
            kept_for_another=dataloader is not active,
            num_processes=num_processes,
            process_index=index,
            num_copies=copies,
            is_counted=is_counted,
        )

    @property
    def collator(self) -> Callable | None:
        """What makes a batch of examples; Trainer wraps it to drop columns."""
        collator = getattr(self.dataloader, "collate_fn", None)
        return getattr(collator, "data_collator", collator)

    @property
    def dataset(self) -> Any:
        """The evaluation set, of whatever type the user has; None without a dataloader."""
        return getattr(self.dataloader, "dataset", None)

    @property
    def sampler(self) -> BatchSampler | None:
        """The batch sampler, without accelerate's wrapper; None if it is not torch's own."""
        return _torch_sampler(self.dataloader)

    @property
    def may_be_read_by_all(self) -> bool:
        """Whether each of several processes may evaluate all examples."""
        return self.num_processes > 1 and not self.is_prepared

    @property
    def examples(self) -> range | None:
        """Places of this process's examples in the sampler's order; None if unknown.

        Places beyond the sampler's end are those of repeated examples.
        """
        outer, sampler = getattr(self.dataloader, "batch_sampler", None), self.sampler
        if sampler is None or self.may_be_read_by_all:
            return None
        splits = any(getattr(a, "split_batches", False) for a in (outer, self.dataloader))
        size = sampler.batch_size // (self.num_processes if splits else 1)
        first = (self.number * self.num_processes + self.process_index) * size
        # Only the last batch may have fewer.
        if size == 1 or self.is_last is False or getattr(outer, "even_batches", False):
            return range(first, first + size)
        one_process_reads_all = self.num_processes > 1 and outer is sampler
        if one_process_reads_all or not isinstance(sampler.sampler, Sized):
            return None
        return range(first, min(first + size, len(sampler.sampler)))

    def num_real_rows(self, num_rows: int) -> int | None:
        """How many of this process's rows come before the repeated examples.

        accelerate repeats examples to fill up the last batch. Trainer drops them when it gathers
        (`gather_for_metrics`), but Seq2SeqTrainer does not (`gather`).

        Returns:
            None if rows are not examples and only some of the examples are repeated.
        """
        if self.num_processes == 1 or self.remainder <= 0:
            return num_rows
        # If one process reads for all, the dataloader does not tell the size of its batches.
        batch_size = getattr(self.dataloader, "total_batch_size", num_rows * self.num_processes)
        num_examples = batch_size // self.num_processes
        num_real = min(max(self.remainder - self.process_index * num_examples, 0), num_examples)
        if num_rows == num_examples or num_real == 0:
            return num_real
        # Trainer counts in examples, so it would drop rows if there are more rows than examples.
        return num_rows if num_real == num_examples > num_rows else None

    def num_dropped(self, num_rows: int) -> int:
        """How many of the last rows Trainer drops, although the one process has repeated none.

        `gather_for_metrics` keeps the first `remainder` rows when the dataloader of accelerate that
        began last is at its end. It takes rows for examples, and that dataloader for the
        evaluation's.
        """
        if self.num_processes > 1 or self.num_kept is None:
            return 0
        return max(num_rows - self.num_kept, 0)

    def counted_once(self, rows: np.ndarray, blank: np.ndarray) -> np.ndarray:
        """Rows (B, n) such that those of all processes together, or the first of them if Trainer
        keeps no more, hold the rows of each example once, and else blanks.

        If one process has evaluated all examples, the rows that Trainer drops are added to the last
        that it keeps.

        Processes that share a model read the same examples, and Trainer gathers the rows of all.
        It then keeps the first `remainder`, as if no example came twice. So the rows of the last
        batch change places: a gather of a few numbers for each.
        """
        if (num_dropped := self.num_dropped(len(rows))) > 0:
            first, rest = np.split(rows, [len(rows) - num_dropped - 1])
            blanks = np.tile(blank, (num_dropped, 1))
            rows = np.concatenate([first, rest.sum(axis=0, keepdims=True), blanks])
        if self.num_copies == 1:
            return rows
        blanks = np.tile(blank, (len(rows), 1))
        if self.remainder <= 0:
            return rows if self.is_counted else blanks
        processes = Processes.launched()
        mine = (self.process_index, rows) if self.is_counted else None
        counted = sorted(
            (one for one in processes.gather(Attempt(mine)) if one is not None),
            key=lambda one: one[0],
        )
        real = np.concatenate([rows for _, rows in counted])
        here = real[processes.rank * len(rows) :][: len(rows)]
        return np.concatenate([here, blanks[len(here) :]])

    @property
    def num_ranks(self) -> int:
        """How many processes Trainer gathers rows of."""
        return self.num_processes * self.num_copies

    def loses_rows(self, num_rows: int) -> bool:
        """Whether Trainer may drop rows of several processes that are no repeats."""
        if self.num_processes == 1 or self.num_kept is None or not self.kept_for_another:
            return False
        return self.num_kept < num_rows * self.num_ranks

    def unseen_repeats(self) -> str | None:
        """Why several processes may count an example twice without a trace; None if they do not."""
        if self.num_processes == 1:
            return None
        if self.may_be_read_by_all:
            return (
                "accelerate has not prepared the evaluation dataloader, so each process may have "
                "evaluated all examples. Return accelerator.prepare(dataloader) from "
                "get_eval_dataloader."
            )
        if self.is_last and type(self.dataset).__name__ == "IterableDatasetShard":
            return (
                "Each process reads the evaluation stream by itself, so accelerate may have "
                "repeated examples to fill up the last batches, and these count. Let one process "
                'read it for all: accelerator_config={"dispatch_batches": True}.'
            )
        return None


def _torch_sampler(dataloader) -> BatchSampler | None:
    """The batch sampler, without accelerate's wrapper; None if it is not torch's own."""
    outer = getattr(dataloader, "batch_sampler", None)
    sampler = getattr(outer, "batch_sampler", outer)
    return sampler if type(sampler) is BatchSampler else None
