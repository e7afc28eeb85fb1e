"""A Ray Dataset of your own, with a column of texts -> the same with their sums -> the result.

with cluster():
    scored = with_sums(ray.data.read_parquet("s3://bucket/data/"), model_id="gpt2")
    scored.write_parquet("s3://bucket/scored/")
    result = result_of(ray.data.read_parquet("s3://bucket/scored/"), group_column="domain")
"""

import json
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa

from ppleval.cli.per_text_parquet import sums_columns, sums_of
from ppleval.ray import cluster as ray_cluster
from ppleval.ray.files import settings_of
from ppleval.ray.totals import Answer, CorpusTotals
from ppleval.stats.totals import TextSums
from ppleval.texts.inputs import is_conversation

if TYPE_CHECKING:
    from ray.data import Dataset

    from ppleval.texts.engine import TextScorer
# Beside the sums of each text: what they depend on, which is the same in all rows.
SETTINGS = "settings"
# Texts that are packed into batches together.
TEXTS_AT_ONCE = 2048


class AddSums:
    """For `Dataset.map_batches` with batch_format="pyarrow": it holds the model, adds the columns.

    Args:
        column, context_column: those of the texts and, if any, of the contexts.
        options: as for `compute`; they name the model.
    """

    def __init__(self, column: str, context_column: str | None, options: dict):
        self._column, self._context_column = column, context_column
        self._options = options
        self._scorer: TextScorer | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        texts = batch[self._column].to_pylist()
        contexts = None
        if self._context_column is not None:
            contexts = batch[self._context_column].to_pylist()
        if self._scorer is None:
            from ppleval.metric import Perplexity  # with torch

            kind = is_conversation(texts[0])
            options: dict[str, Any] = {"conversations": kind} | self._options
            self._scorer = Perplexity().text_scorer(**options)
        sums = [sums for _, sums in self._scorer.sums(texts, contexts)]
        if len(sums) != len(texts):
            raise ValueError("The preset joins all texts, so they have no sums of their own.")
        settings = json.dumps(settings_of(self._scorer, contexts is not None))
        columns = sums_columns(sums) | {SETTINGS: pa.array([settings] * len(sums))}
        for name, values in columns.items():
            if name in batch.column_names:
                raise ValueError(f"The dataset has a column {name!r} already; rename it.")
            batch = batch.append_column(name, values)
        return batch


def with_sums(
    dataset: "Dataset",
    column: str = "text",
    *,
    context_column: str | None = None,
    workers: int | None = None,
    **options,
) -> "Dataset":
    """The dataset with columns for the perplexity of each text and its sums; lazy, as all are.

    Args:
        column: that of the texts or the conversations.
        context_column: that of the contexts, if any.
        workers: how many hold the model; by default one for each GPU, or else each CPU.
        options: as for `compute`; they name the model.

    Raises:
        ValueError: more workers than the cluster has GPUs or CPUs.
    """
    return dataset.map_batches(
        cast("Callable", AddSums),
        fn_constructor_args=(column, context_column, options),
        batch_format="pyarrow",
        batch_size=TEXTS_AT_ONCE,
        **ray_cluster.pool(workers, options.get("device")),
    )


def result_of(dataset: "Dataset", group_column: str | None = None) -> dict[str, Any]:
    """The result of `compute` for a dataset of `with_sums`, without lists of perplexities.

    Args:
        group_column: the column that names each text's group, if the result is to have groups.

    Raises:
        ValueError: the rows were scored with different settings.
    """
    count = partial(_answer, group_column=group_column)
    return CorpusTotals.of(
        dataset.map_batches(cast("Callable", count), batch_format="pyarrow")
    ).result()


def _answer(batch: pa.Table, group_column: str | None) -> dict[str, list[bytes]]:
    sums = sums_of(batch, TextSums)
    groups = None
    if group_column is not None:
        groups = [str(group) for group in batch[group_column].to_pylist()]
    settings, *others = batch[SETTINGS].unique().to_pylist()
    answer = Answer.of(sums, groups, json.loads(settings))
    if others:
        answer = Answer(error="The texts of a batch were scored with different settings.")
    return {name: [value] for name, value in answer.packed().items()}
