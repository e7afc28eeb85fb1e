"""Logits -> nll per token: what users call.

Nothing here knows of evaluate, datasets or transformers.
"""

from collections.abc import Sequence

import torch

from ppleval.logits.dtensors import Part, part_of, whole_of
from ppleval.logits.gradients import LogitsNll, attached, need_gradient
from ppleval.logits.kernels import Reduction, launch
from ppleval.logits.outputs import TokenStats
from ppleval.logits.tensors import IGNORE_INDEX, as_tensor, check_types, is_scored
from ppleval.logits.vocab_parallel import PartWork, reduce_part, refuse_gradient, work_on_logits


def token_nll(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int | Sequence[int] | None = IGNORE_INDEX,
    from_logits: bool = True,
    dtype: str | torch.dtype = torch.float32,
    backend: str = "auto",
    vocab_start: int | None = None,
    process_group=None,
) -> torch.Tensor:
    """Negative log-likelihood of each target, in nats.

        nll = logsumexp(logits, -1) - logits[target]            from_logits=True
        nll = log(sum(p, -1)) - log(p[target])                  from_logits=False

    It equals `F.cross_entropy(logits.float(), targets, reduction="none")`, without a second tensor
    of the size of the logits. On CUDA each logit is read once, by a Triton kernel; elsewhere blocks
    of rows pass through a buffer.

    Logits that require a gradient get one, block by block and rounded once; a row has none where it
    is ignored or its nll has weight 0, and NaN where its nll is NaN. It cannot be differentiated
    again.

    Logits that several processes share need not be gathered: pass a DTensor, or the local columns
    with `vocab_start` and `process_group`. Every process of it calls this, with the same targets.
    Per scored token three numbers of the reduction's dtype pass: one for the maximum, two for sums.
    A gradient is refused.

    Args:
        logits: (..., vocab_size), any float dtype, device and strides; an array or nested list is
            converted. With `from_logits=False`: probabilities, divided by their row sum.
            A DTensor with Shard, along any dimensions, and Replicate.
        targets: (...), integer ids; moved to the device of the logits. Those of all rows, also for
            a DTensor of some rows; or a DTensor, which is gathered.
        ignore_index: the id or ids that are not scored, None for none.
        from_logits: whether `logits` are scores before softmax (log-probabilities are such scores).
        dtype: float32 or float64, the precision of the reduction; float64 logits take float64.
        backend: "triton", "torch", or "auto" for Triton on CUDA, where it is installed and the
            reduction is in float32, and else torch.
        vocab_start, process_group: for logits that are some columns of the vocabulary: the id of
            the first of them, and the processes that have the others, which may be of any number.

    Returns:
        nll, the shape of `targets`, float32 or float64, on the device of the logits; 0 where
        ignored, inf where the target has probability 0, NaN where its row holds NaN or +inf or has
        no probability anywhere. Of a DTensor: a DTensor, sharded along batch and sequence as the
        logits are, replicated over processes that share the vocabulary.

    Raises:
        TypeError: logits that are not floating point, targets that are not integers.
        ValueError: shapes that do not fit, a scored target outside [0, vocab_size), with
            `from_logits=False` a negative or non-finite value in a scored row, and with
            `backend="triton"` a device or dtype that it does not run on. With logits that several
            processes share also: different targets or settings, columns that leave gaps.
        ConnectionError: another process of these failed, or is gone.
    """
    part = part_of(logits, "logits", vocab_start, process_group)
    if part is not None:
        options = {"from_logits": from_logits, "dtype": dtype, "backend": backend}
        reduction = _reduce_part(part, part.given, targets, ignore_index, **options)
        return part.spread(reduction.result().nll)
    given = logits
    logits, targets = _checked(logits, targets)
    scored = is_scored(targets, ignore_index)
    options = {"from_logits": from_logits, "dtype": dtype, "backend": backend}
    nll = launch(logits, targets, scored, **options).result().nll
    given = attached(given, logits)
    if need_gradient(given):
        return LogitsNll.apply(given, nll, targets, scored, from_logits)
    return nll


def token_stats(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int | Sequence[int] | None = IGNORE_INDEX,
    dtype: str | torch.dtype = torch.float32,
    backend: str = "auto",
    vocab_start: int | None = None,
    process_group=None,
) -> TokenStats:
    """nll, and what the same pass over the logits gives besides.

        lse     = logsumexp(logits, -1)                                 of each row
        entropy = -sum(p log p, -1) with p = softmax(logits, -1)        nats, of the prediction
        rank    = 1 + sum(logits > logits[target], -1)                  1 where it is the argmax

    Where a row holds NaN, its order is undefined and the rank means nothing.

    Of logits that several processes share, five numbers pass per scored token: the three of
    `token_nll`, and then the parts of the entropy and of the rank.

    Args, Raises: as `token_nll`.

    Returns:
        nll, lse, entropy and rank, each of the shape of `targets`; 0 where ignored. DTensors for a
        DTensor, as `token_nll` says.
    """
    part = part_of(logits, "logits", vocab_start, process_group)
    if part is not None:
        options = {"dtype": dtype, "backend": backend, "with_all": True}
        stats = _reduce_part(part, None, targets, ignore_index, **options).result()
        return stats.with_tensors([part.spread(values) for values in stats.tensors])
    logits, targets = _checked(logits, targets)
    scored = is_scored(targets, ignore_index)
    return launch(logits, targets, scored, dtype=dtype, backend=backend, with_all=True).result()


def _checked(logits, targets) -> tuple[torch.Tensor, torch.Tensor]:
    logits, targets = as_tensor(logits, "logits"), as_tensor(targets, "targets")
    check_types(logits, targets, "logits", "targets")
    _check_shapes(logits.shape, targets.shape)
    return logits, targets


def _check_shapes(logits: torch.Size, targets: torch.Size) -> None:
    if len(logits) == 0 or logits[:-1] != targets:
        raise ValueError(
            f"logits must be (..., vocab_size) and targets (...), got {tuple(logits)} "
            f"and {tuple(targets)}."
        )


def _reduce_part(part: Part, given, targets, ignore_index, **options) -> Reduction:
    """Reduce logits that processes share; `given` are those that may require a gradient."""
    targets = whole_of(targets)

    def work() -> PartWork:
        refuse_gradient(given)
        part.check_shape("logits")
        logits, checked = as_tensor(part.local, "logits"), as_tensor(targets, "targets")
        check_types(logits, checked, "logits", "targets")
        _check_shapes(logits.shape if part.whole is None else part.whole.shape, checked.shape)
        return work_on_logits(logits, checked, is_scored(checked, ignore_index), **options)

    return reduce_part(part, part.attempt(work))
