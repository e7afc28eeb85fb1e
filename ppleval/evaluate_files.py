"""Sums over the processes of `evaluate.load(num_process=...)`, by evaluate's own files."""

import datasets
import evaluate

from ppleval.stats.runs import Run

# Of the row of numbers that a process writes.
COLUMNS = [f"column_{i}" for i in range(len(Run().numbers()))]


class _Exchange(evaluate.Metric):
    """Carries one row of numbers for each process through evaluate's file protocol.

    perplexity.py must not import it, because evaluate.load takes the first metric that it finds
    there.
    """

    def _info(self) -> evaluate.MetricInfo:
        kinds = {int: datasets.Value("int64"), float: datasets.Value("float64")}
        numbers = zip(COLUMNS, Run().numbers(), strict=True)
        features = {name: kinds[type(number)] for name, number in numbers}
        return evaluate.MetricInfo(
            description="", citation="", features=datasets.Features(features)
        )

    def _compute(self, **columns):
        return {name: sum(values) for name, values in columns.items()}


def add_over_files(run: Run, metric: evaluate.Metric) -> Run | None:
    """The runs of all processes, added up, on process 0; None on the others.

    Args:
        run: that of this process.
        metric: its `num_process`, and where and how they meet.

    Raises:
        ValueError: the run has groups, which evaluate's files do not carry.
    """
    if run.groups:
        raise ValueError("groups go with one process or with sync=True, not with num_process.")
    exchange = _Exchange(
        cache_dir=metric._data_dir_root,
        num_process=metric.num_process,
        process_id=metric.process_id,
        experiment_id=metric.experiment_id,
        timeout=metric.timeout,
    )
    row = {name: [number] for name, number in zip(COLUMNS, run.numbers(), strict=True)}
    sums = exchange.compute(**row)
    return None if sums is None else Run.of([sums[name] for name in COLUMNS])
