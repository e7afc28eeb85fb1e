"""The examples in a batch of an evaluation, as far as accelerate knows them. No logits, no sums.

Trainer gives its hooks the outputs and the labels of a batch only. accelerate knows the dataloader,
whether the batch is the last, and the processes. It repeats examples so that every process gets
equally many, and Trainer drops rows that it takes for these.
"""

from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import BatchSampler, DataLoader

from .processes import Attempt, Processes


@dataclass(frozen=True)
class EvalBatch:
    """One batch on this process."""

    number: int  # how many batches this process has evaluated before
    dataloader: DataLoader | None  # the one in use; None if accelerate has not prepared it
    is_last: bool
    remainder: int  # examples in the last batch, over all processes; -1 if unknown or not the last
    num_processes: int  # that read different examples
    process_index: int  # among these
    num_copies: int = 1  # processes that read the same examples, for one model that they share
    is_counted: bool = True  # one of these is

    @classmethod
    def read(cls, number: int, processes: Processes | None) -> "EvalBatch":
        """The batch that is evaluated now.

        Args:
            number: how many came before.
            processes: those that read different examples; None for what accelerate says.
        """
        # Every Trainer has accelerate; the rest of the metric does without.
        from accelerate.state import AcceleratorState, GradientState, PartialState

        state, launch = GradientState(), PartialState()
        if processes is None:
            # Tensor and context parallelism, whose ranks stand side by side.
            parallel = AcceleratorState._shared_state.get("parallelism_config")
            copies = 1 if parallel is None else parallel.tp_size * parallel.cp_size
            share = launch.num_processes // copies, launch.process_index // copies
            is_counted = launch.process_index % copies == 0
        else:
            copies = launch.num_processes // processes.size
            share = processes.size, processes.rank
            is_counted = 0 in processes.members
        return cls(
            number=number,
            dataloader=state.active_dataloader,
            is_last=state.end_of_dataloader,
            remainder=state.remainder if state.end_of_dataloader else -1,
            num_processes=share[0],
            process_index=share[1],
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
        outer = getattr(self.dataloader, "batch_sampler", None)
        sampler = getattr(outer, "batch_sampler", outer)
        return sampler if type(sampler) is BatchSampler else None

    @property
    def examples(self) -> range | None:
        """Places of this process's examples in the sampler's order; None if unknown.

        Places beyond the sampler's end are those of repeated examples.
        """
        outer, sampler = getattr(self.dataloader, "batch_sampler", None), self.sampler
        if sampler is None:
            return None
        splits = any(getattr(a, "split_batches", False) for a in (outer, self.dataloader))
        size = sampler.batch_size // (self.num_processes if splits else 1)
        first = (self.number * self.num_processes + self.process_index) * size
        # Only the last batch may have fewer.
        if size == 1 or not self.is_last or getattr(outer, "even_batches", False):
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

    def counted_once(self, rows: np.ndarray, blank: np.ndarray) -> np.ndarray:
        """Rows (B, n) such that those of all processes together, or the first `remainder` of them
        if this is the last batch, hold the rows of each example once, and else blanks.

        Processes that share a model read the same examples, and Trainer gathers the rows of all.
        It then keeps the first `remainder`, as if no example came twice. So the rows of the last
        batch change places: a gather of a few numbers for each.
        """
        if self.num_copies == 1:
            return rows
        blanks = np.tile(blank, (len(rows), 1))
        if self.remainder <= 0:
            return rows if self.is_counted else blanks
        launch = Processes.launched()
        mine = (self.process_index, rows) if self.is_counted else None
        shares = sorted(
            (share for share in launch.gather(Attempt(mine)) if share is not None),
            key=lambda share: share[0],
        )
        real = np.concatenate([rows for _, rows in shares])
        here = real[launch.rank * len(rows) :][: len(rows)]
        return np.concatenate([here, blanks[len(here) :]])

    def loses_rows(self, num_rows: int) -> bool:
        """Whether Trainer drops some rows although one process repeats no example.

        `gather_for_metrics` takes rows for examples, and keeps `remainder` of the last batch.
        """
        return self.num_processes == 1 and 0 < self.remainder < num_rows

    def unseen_repeats(self) -> str | None:
        """Why several processes may count an example twice without a trace; None if they do not."""
        if self.num_processes == 1:
            return None
        if self.dataloader is None:
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


def current_evaluation() -> tuple[int, int]:
    """A value that differs from one evaluation to the next, also if the first was interrupted.

    The next evaluation has another dataloader or, with persistent workers, the same one again. Then
    accelerate still counts the interrupted pass.
    """
    from accelerate.state import GradientState

    state = GradientState()
    return id(state.active_dataloader), len(state.dataloader_references)
