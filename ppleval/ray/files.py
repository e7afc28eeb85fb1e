"""`ppleval compute --engine ray`: the files of a corpus -> totals, by workers that may die.

    files -> read_chunks: chunks of texts -> ChunkScorer: an answer for each chunk -> CorpusTotals

Ray Data runs the first two on the machines of a cluster, holds readers back where texts are not
scored as fast, and gives the work of a worker that died to another. A text goes from a reader to a
worker, its sums from there to --per-text, and a dozen numbers for each chunk to this process, which
keeps no text.
"""

import itertools
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, cast

from ppleval.cli.rows import MAX_TEXT_BYTES, Row
from ppleval.cli.sources import read_rows
from ppleval.ray import cluster as ray_cluster
from ppleval.ray.totals import Answer, CorpusTotals
from ppleval.stats.totals import TextSums
from ppleval.texts.inputs import plain
from ppleval.texts.schedule import portions as cut

if TYPE_CHECKING:
    from ppleval.cli.per_text_parquet import PerTextDirectory
    from ppleval.texts.engine import TextScorer
# A chunk holds one portion of texts that are packed into batches together (texts/schedule.py),
# later ones more: a small corpus is shared out evenly, and a large one makes no millions of files.
CHUNKS_OF_A_SIZE = 8
MOST_PORTIONS = 16
# A worker that dies three times over the same texts dies because of them, such as of their length.
MOST_ATTEMPTS = 3
# What users see as one sentence, as in cli/main.py. Other errors are faults of the program.
ERRORS = (ValueError, TypeError, OSError, ModuleNotFoundError)


@dataclass(frozen=True)
class Job:
    """What is to be done, as it goes to each worker: plain values."""

    options: dict  # of `text_scorer`
    lines: bool
    column: str
    group_by: str | None
    context_column: str | None
    batch_size: int | None
    per_text: str | None  # a directory, or its URI
    directory: str  # where names of files begin
    max_text_bytes: int = MAX_TEXT_BYTES

    def output(self) -> "PerTextDirectory | None":
        """Where the sums of each text are written, if they are."""
        from ppleval.cli.per_text_parquet import PerTextDirectory

        return None if self.per_text is None else PerTextDirectory(self.per_text)


def joins_texts(job: Job) -> bool:
    """Whether the preset makes one text of all.

    Raises:
        TypeError, ValueError: options that do not fit, which a worker would refuse later.
    """
    from ppleval.models.loading import ModelSource, split_names
    from ppleval.texts.options import TextOptions

    source, text_options = split_names(job.options, ModelSource)
    ModelSource(**source)
    return TextOptions(**text_options).rules.joint is not None


@dataclass(frozen=True)
class Chunk:
    """Consecutive texts of one file."""

    place: tuple[int, int] = (0, 0)  # the number of the file, and of its first row
    file: str = ""
    portions: Sequence[Sequence[Row]] = ()  # those that are packed into batches together
    finished: "Sequence[TextSums] | None" = None  # what an interrupted run has written of them
    error: str | None = None  # why the file cannot be read

    @property
    def rows(self) -> list[Row]:
        """The texts of all portions."""
        return [row for portion in self.portions for row in portion]


def read_chunks(item: dict, job: Job) -> Iterator[dict]:
    """The chunks of a file, each as a row of a data set; an error is the last one."""
    number, file = item["number"], item["file"]
    first = 0
    try:
        os.chdir(job.directory)
        output = job.output()
        for portions in _portions_of_chunks(file, job):
            chunk = Chunk((number, first), file, portions)
            if output is not None:
                finished = output.read(file, first, chunk.rows, TextSums)
                chunk = replace(chunk, finished=finished)
            first += len(chunk.rows)
            yield {"chunk": pickle.dumps(chunk)}
    except ERRORS as error:
        yield {"chunk": pickle.dumps(Chunk(error=str(error)))}


def _portions_of_chunks(file: str, job: Job) -> Iterator[list[list[Row]]]:
    """The portions of each chunk. They are those that one process would score of this file."""
    rows, copy = itertools.tee(
        read_rows(
            [file],
            job.lines,
            job.column,
            job.group_by,
            job.context_column,
            job.max_text_bytes,
        )
    )
    portions = (
        list(itertools.islice(rows, len(portion)))
        for portion in cut((plain(row.text), row.context) for row in copy)
    )
    for number in itertools.count():
        size = min(1 + number // CHUNKS_OF_A_SIZE, MOST_PORTIONS)
        chunk = list(itertools.islice(portions, size))
        if not chunk:
            return
        yield chunk


class ChunkScorer:
    """A worker: it holds the model, which it loads with the first chunk.

    Args:
        attempts: the `Attempts` of all workers, an actor of Ray.
    """

    def __init__(self, job: Job, attempts):
        self._job, self._attempts = job, attempts

    def __call__(self, row: dict) -> dict:
        try:
            return self._answer(pickle.loads(row["chunk"])).packed()
        except ERRORS as error:
            return Answer(error=str(error)).packed()

    def _answer(self, chunk: Chunk) -> Answer:
        import ray

        if chunk.error is not None:
            return Answer(error=chunk.error)
        attempts: int = ray.get(self._attempts.begin.remote(chunk.place))  # pyright: ignore
        if attempts > MOST_ATTEMPTS:
            last = chunk.place[1] + len(chunk.rows) - 1
            raise ValueError(
                f"{MOST_ATTEMPTS} workers died while they scored rows {chunk.place[1]} to {last} "
                f"of {chunk.file}. If memory ran out, pass a smaller --batch-size or --window."
            )
        answer = self._scored(chunk)
        self._attempts.end.remote(chunk.place)
        return answer

    def _scored(self, chunk: Chunk) -> Answer:
        job, rows, settings = self._job, chunk.rows, self._settings
        sums, num_finished = chunk.finished, len(rows)
        if sums is None:
            sums, num_finished = self._sums(chunk), 0
            output = job.output()
            if output is not None:
                output.write(chunk.file, chunk.place[1], rows, sums)
        groups = None if job.group_by is None else [str(row.group) for row in rows]
        return Answer.of(sums, groups, settings, chunk.place, num_finished)

    @cached_property
    def _scorer(self) -> "TextScorer":
        os.chdir(self._job.directory)
        from ppleval.metric import Perplexity  # with torch

        return Perplexity().text_scorer(**self._job.options)

    @cached_property
    def _settings(self) -> dict:
        """What the sums depend on, with which --per-text has to agree."""
        settings = settings_of(self._scorer, self._job.context_column is not None)
        output, group_by = self._job.output(), self._job.group_by
        if output is not None:
            output.agree(settings | ({} if group_by is None else {"group_by": group_by}))
        return settings

    def _sums(self, chunk: Chunk) -> "list[TextSums]":
        """The sums of the texts, in batches of the same texts as in one process."""
        sums = []
        for portion in chunk.portions:
            texts: list[Any] = [row.text for row in portion]
            contexts: list[Any] | None = None
            if self._job.context_column is not None:
                contexts = [row.context for row in portion]
            try:
                sums += self._scorer.portion_sums(texts, contexts, batch_size=self._job.batch_size)
            except (TypeError, ValueError) as error:
                first = chunk.place[1] + len(sums)
                raise ValueError(f"{chunk.file}, from row {first} on: {error}") from error
        return sums


def settings_of(scorer: "TextScorer", with_contexts: bool) -> dict:
    """What sums depend on, and what their result shows: plain values."""
    return {"signature": scorer.signature(with_contexts), **asdict(scorer.report(with_contexts))}


class Attempts:
    """An actor that counts how often workers began each chunk, so that a fatal one ends the run."""

    def __init__(self):
        self._counts: dict[tuple[int, int], int] = {}

    def begin(self, place: tuple[int, int]) -> int:
        """How often a chunk was begun, this time included."""
        self._counts[place] = self._counts.get(place, 0) + 1
        return self._counts[place]

    def end(self, place: tuple[int, int]) -> None:
        """Forget a chunk that was scored."""
        self._counts.pop(place, None)


def score_files(
    job: Job, files: Sequence[str], workers: int | None, device: str | None
) -> CorpusTotals:
    """Score the texts of the files on a Ray cluster that is connected.

    Raises:
        ValueError: what `compute` and `read_rows` refuse, or a cluster that is too small.
        ConnectionError: the cluster is gone.
    """
    import ray
    from ray.data import DataContext, TaskPoolStrategy
    from ray.exceptions import RayError, RayTaskError

    pool = ray_cluster.pool(workers, device)
    context = DataContext.get_current().copy()
    context.target_max_block_size = 1  # each chunk is a block of its own, which goes to any worker
    with DataContext.current(context):
        items = [{"number": number, "file": file} for number, file in enumerate(files)]
        attempts = ray.remote(num_cpus=0)(Attempts).remote()
        answers = (
            ray.data.from_items(items, override_num_blocks=len(items))
            # Readers ask for no CPU, which the workers have taken. One feeds many workers.
            .flat_map(
                cast("Callable", partial(read_chunks, job=job)),
                num_cpus=0,
                compute=TaskPoolStrategy(size=1 + pool["compute"].max_size // 8),
            )
            .map(cast("Callable", ChunkScorer), fn_constructor_args=(job, attempts), **pool)
        )
        try:
            return CorpusTotals.of(answers)
        except RayTaskError:  # a fault of the program, with its traceback
            raise
        except RayError as error:
            reason = str(error).splitlines()[0]
            raise ConnectionError(f"The Ray cluster could not finish the run: {reason}") from error
