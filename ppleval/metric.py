"""Perplexity: what users call. The arithmetic is in the rooms below."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils.logging import is_progress_bar_enabled

from ppleval.arguments import UNSET, given, refuse
from ppleval.distributed import ALONE, Processes, num_launched
from ppleval.logits.nll import token_nll, token_stats
from ppleval.logits.options import Options
from ppleval.logits.output_layer import linear_token_nll
from ppleval.models.loading import BaseSource, Check, KeptModel, ModelSource, split_names
from ppleval.models.pair import ModelPair, same_tokens
from ppleval.models.saved_base import SavedBase, check_place
from ppleval.pending import Batch, Pending
from ppleval.show.plots import plot
from ppleval.stats.groups import checked_groups
from ppleval.stats.runs import Run
from ppleval.stats.totals import Result
from ppleval.texts.checks import check_scores, checked_texts
from ppleval.texts.compare import ByteComparer, TextComparer, TextComparison
from ppleval.texts.corpus import corpus_result
from ppleval.texts.engine import READERS, TextScorer, kinds_for
from ppleval.texts.inputs import check_collection, check_texts, checked_pairs, with_kind
from ppleval.texts.options import TextOptions
from ppleval.texts.saving import TextSaver
from ppleval.texts.score import TextScore
from ppleval.trainer.hooks import TrainerHooks
from ppleval.user_warnings import warn_user

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOGIT_OPTIONS = {field.name for field in fields(Options)}


class Perplexity:
    """Corpus perplexity from logits, from probabilities, or from texts and a model; see `compute`.

    Every batch is reduced to a few sums in the call that brings it, so logits are never stored. A
    call that raises changes nothing that was accumulated. Threads may add at once: each batch
    counts in one result.

    Args:
        from_logits: predictions are scores before softmax, or log-probabilities (True), or
            probabilities, which are divided by their row sum (False).
        ignore_index: references with this id, or one of these, are not scored; None for none.
        mask_token_id: one more id that is not scored, such as the padding.
        shift: True if references are the input ids of a causal model: position t of the logits is
            then scored against id t+1.
        dtype: precision of the reduction, "float32" or "float64".
        backend: what reduces the logits: "triton", "torch", or "auto", for Triton on CUDA and else
            torch.

    Raises:
        TypeError, ValueError: an option that does not exist, or with a bad value.
    """

    token_nll = staticmethod(token_nll)
    token_stats = staticmethod(token_stats)
    linear_token_nll = staticmethod(linear_token_nll)
    plot = staticmethod(plot)

    def __init__(
        self,
        *,
        from_logits: bool = True,
        ignore_index: int | Sequence[int] | None = -100,
        mask_token_id: int | None = None,
        shift: bool = False,
        dtype: str = "float32",
        backend: str = "auto",
        **unknown,
    ):
        refuse(unknown, Perplexity.__init__, type(self))
        self._options = Options(from_logits, ignore_index, mask_token_id, shift, dtype, backend)
        self._kept, self._kept_base = KeptModel(), KeptModel()
        self._pending = Pending(self._options)

    def __getstate__(self) -> dict:
        # A model is loaded anew where it is needed, rather than sent along.
        return {**self.__dict__, "_kept": KeptModel(), "_kept_base": KeptModel()}

    def __repr__(self) -> str:
        return f"<Perplexity of {len(self)} sequences so far, {self._options.signature}>"

    def __len__(self) -> int:
        """Number of sequences and texts accumulated since the last `compute` or `reset`."""
        return len(self._pending)

    def reset(self) -> None:
        """Drop everything that was added."""
        self._pending.clear()

    def add_batch(
        self, *, predictions=None, references=None, sample_weight=None, groups=None, **unknown
    ) -> None:
        """Add a batch of sequences, or of texts, which wait for the model of `compute`.

        Raises:
            TypeError, ValueError: input of the wrong type, shape or range; nothing is added.
        """
        refuse(unknown, Perplexity.add_batch, type(self))
        batch = Batch(predictions, references, sample_weight, groups)
        if not batch.holds_texts:
            self._pending.add_batch(batch)
        elif sample_weight is None:
            check_texts(batch.predictions)
            pairs = checked_pairs(batch.predictions, None, with_kind(batch.predictions)[1])
            texts = [text for text, _ in pairs]
            self._pending.add_texts(texts, None if groups is None else checked_groups(groups))
        else:
            raise ValueError("Texts go without sample_weight.")

    def add(
        self, *, prediction=None, reference=None, sample_weight=None, group=None, **unknown
    ) -> None:
        """Add one sequence, logits (T, V) and ids (T,), with one weight or T weights; or one text.

        Raises:
            TypeError, ValueError: input of the wrong type, shape or range; nothing is added.
        """
        refuse(unknown, Perplexity.add, type(self))
        self.add_batch(
            predictions=[prediction],
            references=None if reference is None else [reference],
            sample_weight=None if sample_weight is None else [sample_weight],
            groups=None if group is None else [group],
        )

    def __call__(
        self, *, predictions=None, references=None, sample_weight=None, **unknown
    ) -> float:
        """Add a batch, and return the perplexity of that batch alone.

        Raises:
            TypeError, ValueError: input of the wrong type, shape or range; nothing is added.
        """
        refuse(unknown, Perplexity.__call__, type(self))
        batch = Batch(predictions, references, sample_weight)
        return self._pending.add_batch(batch).totals.perplexity

    def merge(self, other: "Perplexity") -> None:
        """Add everything that was added to `other`, which keeps it.

        Raises:
            TypeError: `other` is not of this class.
            ValueError: its options differ from these, or `sync` was called on one of the two.
        """
        if not isinstance(other, Perplexity):
            raise TypeError(f"merge takes another Perplexity, got {type(other).__name__}.")
        self._pending.merge(other._pending)

    def sync(self, process_group=None) -> None:
        """Add up the sums of all processes of torchrun or accelerate, on each of them.

        One all-reduce of a few float64 numbers. The processes may have different numbers of
        batches, also none. Call `compute` or `reset` next: more batches would count once for each
        process. `compute(sync=True)` syncs and computes.

        Args:
            process_group: those of torch.distributed that have different batches; by default all.

        Raises:
            TypeError: a process_group that is none.
            ValueError: `sync` was called before, texts are pending, the processes are not
                connected, or this one is not in the group.
            ConnectionError: another process failed or is gone; nothing changes here.
        """
        self._check_one_protocol()
        self._pending.sync(Processes.to_sync(True, process_group))

    def trainer_hooks(
        self,
        *,
        shift: bool | None = None,
        groups=None,
        process_group=None,
        from_logits: bool = UNSET,
        ignore_index: int | Sequence[int] | None = UNSET,
        mask_token_id: int | None = UNSET,
        dtype: str = UNSET,
        backend: str = UNSET,
        **unknown,
    ) -> dict[str, Callable]:
        """`preprocess_logits_for_metrics` and `compute_metrics` for a transformers Trainer.

            Trainer(model=model, args=args, eval_dataset=data, **ppl.trainer_hooks())

        Trainer then reports perplexity, mean_nll and the rest of the result, under its prefix
        `eval_`. It gathers seven sums for each row, no logits. The hooks keep nothing in this
        metric.

        Args:
            shift: True if the labels are the input ids of a causal model; False if each label
                stands where it is predicted. Default: False for an encoder-decoder and for a
                masked model of transformers, True for all others, and without a Trainer.
            groups: one name for each example of the evaluation set, in its order, such as
                eval_dataset["domain"]. Trainer then also reports perplexity_<name> and
                mean_nll_<name> of each group, macro_mean_nll and macro_perplexity; or none of
                these, with a warning, where it is not known which row is which example.
            process_group: the processes that evaluate different examples, where ranks that share a
                model evaluate the same. Default: as accelerate's ParallelismConfig says.
            from_logits, ignore_index, mask_token_id, dtype, backend: as for `compute`; by default
                those of this metric.

        Raises:
            TypeError, ValueError: an option that does not exist, or with a bad value; groups that
                are no names, or whose metrics would replace others.
        """
        options = given(Perplexity.trainer_hooks, locals(), Options)
        names = None if groups is None else checked_groups(groups)
        processes = None if process_group is None else Processes.of_group(process_group)
        options["shift"] = True if shift is None else shift
        hooks = TrainerHooks(replace(self._options, **options), shift is None, names, processes)
        return {
            "preprocess_logits_for_metrics": hooks.preprocess_logits_for_metrics,
            "compute_metrics": hooks.compute_metrics,
        }

    def compute(
        self,
        *,
        predictions=None,
        references=None,
        sample_weight=None,
        groups=None,
        contexts=None,
        from_logits: bool = UNSET,
        ignore_index: int | Sequence[int] | None = UNSET,
        mask_token_id: int | None = UNSET,
        shift: bool = UNSET,
        dtype: str = UNSET,
        backend: str = UNSET,
        model_id: str | os.PathLike | None = None,
        model: "PreTrainedModel | None" = None,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        device: "str | torch.device | None" = None,
        model_kwargs: dict | None = None,
        trust_remote_code: bool = False,
        preset: str | None = None,
        add_start_token: bool | int = True,
        join_contexts: str = "text",
        max_length: int | None = None,
        window: int | None = None,
        stride: int | None = None,
        start_each_window: bool | None = None,
        positions: bool | Sequence[int] = False,
        conversations: bool = UNSET,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        roles: Sequence[str] = ("assistant",),
        pseudo: str | None = None,
        batch_size: int | None = None,
        sync: bool = False,
        process_group=None,
        **unknown,
    ) -> Result | None:
        """Perplexity of everything added before and of the batch given here; then start afresh.

        With `model_id`, or `model` and `tokenizer`, the predictions are texts. The model is kept
        for the next call.

        Args:
            predictions: logits of shape (B, T, V): B sequences, T tokens, a vocabulary of V.
                Tensors on any device, arrays, nested lists, or B sequences of unequal length, each
                (T_i, V).
            references: token ids of shape (B, T), or B sequences of T_i ids.
            sample_weight: weights (B, T), or (B,) for one per sequence; fractions are allowed.
                Default 1.
            groups: one name for each sequence or text, such as its domain; the result then has one
                result for each group. Default: none.

        Options, here and where the metric is made:
            from_logits (bool): predictions are scores before softmax, or log-probabilities (True,
                the default), or probabilities, which are divided by their row sum (False).
            ignore_index (int, several, or None): references with such an id are not scored. Default
                -100.
            mask_token_id (int or None): one more id that is not scored, such as the padding.
                Default None.
            shift (bool): True if references are the input ids of a causal model: position t of the
                logits is then scored against id t+1. Default False.
            dtype (str): precision of the reduction, "float32" or "float64". Default "float32".
            backend (str): what reduces the logits: "triton", "torch", or "auto", the default, for
                Triton on CUDA and else torch.

        Texts and a language model, in place of logits and references:
            predictions: texts: a list, a column of a dataset, any iterable. A generator streams. Or
                conversations: lists of messages, each with a role and a content.
            model_id (str): a name on the Hub or a directory; or model= and tokenizer=, objects of
                transformers, which are used as and where they are.
            contexts: one prompt for each text, which conditions it and is not scored. The encoder
                of an encoder-decoder reads it.
            join_contexts (str): "text", the default, tokenises a context and its text as one
                string, and a token that spans both belongs to the text; "ids" tokenises each by
                itself.
            add_start_token (bool or int): put the tokenizer's BOS, or this id, before a text that
                does not bring it. Default True.
            max_length (int): the most tokens of a text, start token and context included; longer
                ones are cut. Default: never cut.
            window, stride (int): tokens that the model reads at once, by default its context
                length, and tokens that each further window of a long text scores, by default half
                of that.
            start_each_window (bool): the start token takes the place of the first id of a window
                that begins inside a text, which some models need. Default True; presets have their
                own way.
            positions (bool or tuple): also a result for each bucket of tokens of context: True for
                0, 1, 2-3, 4-7 and so on, or the least context of each bucket. Default False.
            preset (str): whose numbers to give, such as "lm-eval"; docs/texts.md lists them.
                Default: none.
            roles: whose messages of a conversation are scored. Default ("assistant",).
            chat_template (str), chat_template_kwargs (dict): a template for conversations in place
                of the tokenizer's, and what else it gets, such as {"enable_thinking": False}.
            pseudo (str): for a masked language model, its pseudo-perplexity: "original" masks the
                token that is scored, "within_word_l2r" also the later ones of its word. Default:
                none.
            batch_size (int): the most windows at once, besides the bound on their tokens.
            device, model_kwargs (dict), trust_remote_code (bool, default False): how the model is
                loaded.
            dtype, backend (str): as above.

        Several processes, launched by torchrun or accelerate:
            sync (bool): the result, on every one of them, is that of all. Batches are added up over
                the processes; texts, which all have to pass alike, are shared out over the copies
                of the model. Default False.
            process_group: those of torch.distributed among which this is done. Default: all.

        Returns:
            perplexity: exp(mean_nll), over all scored tokens of the corpus.
            mean_nll: nats per token.
            bits_per_token: mean_nll / ln 2.
            perplexity_ci_low, perplexity_ci_high: its 95% confidence interval, at least 1, with
                each sequence as one independent sample; NaN for fewer than two sequences, also
                where they are so unequal that they count as fewer than two equal ones.
            num_tokens, num_sequences: how many were scored.
            groups: with groups, a dict from each name to a result of its own; macro_mean_nll, the
                unweighted mean of the groups' mean_nll, and macro_perplexity, its exp.
            signature: every setting that changes the number.
            positions: with positions, a dict from each bucket, such as "4-7", to a result of its
                own.
            For texts also: perplexities, one for each text; mean_perplexity, their mean;
            bits_per_byte, byte_perplexity and word_perplexity; num_bytes (UTF-8) and num_words of
            the scored text; num_truncated, the number of texts that lost tokens, where max_length
            was given; num_truncated_contexts, the number of contexts longer than the window; with
            preset="gptq" or "llama.cpp" num_dropped_tokens, those behind the last whole chunk; and
            with "llama.cpp" perplexity_standard_error, the +- that the tool prints.

        Raises:
            TypeError, ValueError: input of the wrong type, shape or range, nothing to compute from,
                a model that cannot be used, or options that differ from those of the batches added
                before; these stay as they were.
            ConnectionError: with `sync`, another process failed or is gone.

        Examples:

            A uniform guess over four tokens has perplexity 4:

            >>> import numpy as np
            >>> from ppleval import Perplexity
            >>> ppl = Perplexity()
            >>> logits, labels = np.zeros((2, 3, 4)), np.zeros((2, 3), int)
            >>> result = ppl.compute(predictions=logits, references=labels)
            >>> round(result["perplexity"], 6), result["num_tokens"]
            (4.0, 6)

            Batches add up; what is -100 is not scored:

            >>> logits = np.array([[[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
            >>> ppl.add_batch(predictions=logits, references=[[0, 1]])
            >>> ppl.add_batch(predictions=logits, references=[[2, -100]])
            >>> ppl.add_batch(predictions=logits, references=[[1, 1]])
            >>> {name: value if isinstance(value, int) else round(value, 4)
            ...  for name, value in ppl.compute().items() if name != "signature"}
            ... # doctest: +NORMALIZE_WHITESPACE
            {'perplexity': 3.2037, 'mean_nll': 1.1643, 'bits_per_token': 1.6797,
             'perplexity_ci_low': 1.0, 'perplexity_ci_high': 31.9907,
             'num_tokens': 5, 'num_sequences': 3}

            Probabilities, as keras_hub takes them:

            >>> rng = np.random.RandomState(42)
            >>> target, probabilities = rng.randint(10, size=[2, 5]), rng.uniform(size=(2, 5, 10))
            >>> probabilities /= probabilities.sum(-1, keepdims=True)
            >>> result = ppl.compute(
            ...     predictions=probabilities, references=target, from_logits=False)
            >>> round(result["perplexity"], 4)
            14.3525

            Texts and a model:

            >>> texts = ["Return the number of items.", "Return items number the of."]
            >>> result = ppl.compute(predictions=texts, model_id="tiny_model")
            >>> [round(perplexity) for perplexity in result["perplexities"]]
            [32, 706]
        """
        options = given(Perplexity.compute, locals(), Options, TextOptions, ModelSource)
        if model_id is not None or model is not None:
            if references is not None or sample_weight is not None:
                raise ValueError("Texts and a model go without references and sample_weight.")
            _refuse_those_of(Options, TextOptions, options, "logits and references=")
            processes = Processes.to_sync(sync, process_group)
            return self._compute_texts(
                predictions, contexts, groups, batch_size, options, processes
            )
        options = self._options_of_logits(options, contexts=contexts, batch_size=batch_size)
        batch = Batch(predictions, references, sample_weight, groups)
        if sync is False and process_group is None:
            pending = self._pending.all_batches(batch, options)
        else:
            processes = Processes.to_sync(sync, process_group)
            self._check_one_protocol()
            pending = self._pending.all_batches_of(processes, batch, options)
        with pending as run:
            return self._result_of_logits(run, options)

    def score(
        self,
        predictions=None,
        *,
        contexts=None,
        top_k: int = 0,
        corrected: bool = False,
        model_id: str | os.PathLike | None = None,
        model: "PreTrainedModel | None" = None,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        device: "str | torch.device | None" = None,
        model_kwargs: dict | None = None,
        trust_remote_code: bool = False,
        preset: str | None = None,
        add_start_token: bool | int = True,
        join_contexts: str = "text",
        max_length: int | None = None,
        window: int | None = None,
        stride: int | None = None,
        start_each_window: bool | None = None,
        positions: bool | Sequence[int] = False,
        conversations: bool = UNSET,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        roles: Sequence[str] = ("assistant",),
        pseudo: str | None = None,
        dtype: str = UNSET,
        backend: str = UNSET,
        batch_size: int | None = None,
        **unknown,
    ) -> list[TextScore]:
        """Each text token by token: its tokens and their places, and for each its nll and rank and
        the entropy of the prediction, both in nats. `words` has the nll of each word.

        Args:
            predictions: the texts, or conversations.
            top_k: also give the `top_k` tokens that the model expected most in each place.
            corrected: also give each word's `corrected_nll`, in which the probability that it ends
                counts for it and not for the next word.
            All others: as for `compute`; some name the model.

        Raises:
            TypeError, ValueError: as `compute`; with `corrected`, tokens that do not carry the
                space in front of them, as BERT's.
        """
        options = given(Perplexity.score, locals(), TextOptions, ModelSource)
        check_texts(predictions)
        texts, options = _with_kind_in(predictions, options)
        source, text_options = self._source_and_options(options)
        check_scores(text_options, top_k, corrected)
        texts, contexts = _checked_early(
            ALONE, texts, contexts, text_options, batch_size=batch_size
        )
        with_contexts = contexts is not None
        scorer = self._scorer(source, text_options, ALONE, with_contexts)
        return list(
            scorer.score(
                texts,
                contexts,
                batch_size=batch_size,
                top_k=top_k,
                corrected=corrected,
                progress=self._shows_progress(),
            )
        )

    def text_scorer(
        self,
        *,
        model_id: str | os.PathLike | None = None,
        model: "PreTrainedModel | None" = None,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        device: "str | torch.device | None" = None,
        model_kwargs: dict | None = None,
        trust_remote_code: bool = False,
        preset: str | None = None,
        add_start_token: bool | int = True,
        join_contexts: str = "text",
        max_length: int | None = None,
        window: int | None = None,
        stride: int | None = None,
        start_each_window: bool | None = None,
        positions: bool | Sequence[int] = False,
        conversations: bool = UNSET,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        roles: Sequence[str] = ("assistant",),
        pseudo: str | None = None,
        dtype: str = UNSET,
        backend: str = UNSET,
        sync: bool = False,
        process_group=None,
        **unknown,
    ) -> TextScorer:
        """What `compute` and `score` use for texts, for programs that handle them one by one.

        The model is loaded, and probed, once, and kept until another is asked for.

        Args:
            sync, process_group: whether processes will share the texts out, and which: an error
                of one is then one of all.
            All others: as for `compute`; some name the model.

        Raises:
            TypeError, ValueError: a model, tokenizer or option that does not fit, named.
            ConnectionError: with `sync`, another process refused its model.
        """
        options = given(Perplexity.text_scorer, locals(), TextOptions, ModelSource)
        source, text_options = self._source_and_options(options)
        return self._scorer(source, text_options, Processes.to_sync(sync, process_group))

    def compare(
        self,
        predictions=None,
        *,
        contexts=None,
        groups=None,
        base_id: str | os.PathLike | None = None,
        base: "PreTrainedModel | str | os.PathLike | None" = None,
        base_tokenizer: "PreTrainedTokenizerBase | None" = None,
        base_device: "str | torch.device | None" = None,
        base_kwargs: dict | None = None,
        model_id: str | os.PathLike | None = None,
        model: "PreTrainedModel | None" = None,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        device: "str | torch.device | None" = None,
        model_kwargs: dict | None = None,
        trust_remote_code: bool = False,
        preset: str | None = None,
        add_start_token: bool | int = True,
        join_contexts: str = "text",
        max_length: int | None = None,
        window: int | None = None,
        stride: int | None = None,
        start_each_window: bool | None = None,
        positions: bool | Sequence[int] = False,
        conversations: bool = UNSET,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        roles: Sequence[str] = ("assistant",),
        pseudo: str | None = None,
        dtype: str = UNSET,
        backend: str = UNSET,
        batch_size: int | None = None,
        sync: bool = False,
        process_group=None,
        **unknown,
    ) -> Result:
        """How far a model is from a base on the same texts, with paired 95% intervals.

            ppl.compare(texts, base_id="gpt2", model_id="./gpt2-int4")

        Args:
            predictions: the texts, or conversations.
            base_id, base: a name or a directory; or a model, or the path that `save_base` wrote.
            base_tokenizer, base_device, base_kwargs: of the base, as those of the model.
            All others: as for `compute`; some name the model.

        Returns:
            perplexity, mean_nll and bits_per_byte of both, the base's as base_...;
            bits_per_byte_difference; num_tokens, num_sequences, num_bytes, signature. Where both
            read the same tokens also mean_nll_difference, perplexity_ratio (its exp), mean_kl,
            mean_reverse_kl, quantiles of the KL divergence, same_top, the share of tokens at which
            both expect the same one most, and the distribution of delta_p, the model's probability
            of the token that came less the base's. ..._ci_low and ..._ci_high are intervals.

        Raises:
            TypeError, ValueError: as `compute`; no base, tokenizers that do not fit together, a
                saved base of other texts or settings.
        """
        options = given(Perplexity.compare, locals(), TextOptions, ModelSource, BaseSource)
        check_texts(predictions)
        groups = None if groups is None else checked_groups(groups)
        texts, options = _with_kind_in(predictions, options)
        sources, text_options = self._sources_and_options(options)
        processes = Processes.to_sync(sync, process_group)
        texts, contexts = _checked_early(
            processes, texts, contexts, text_options, groups=groups, batch_size=batch_size
        )
        comparer = self._comparer(*sources, text_options, processes)
        return corpus_result(
            comparer,
            texts,
            contexts,
            groups,
            batch_size=batch_size,
            progress=self._shows_progress(),
            processes=processes,
        )

    def compare_tokens(
        self,
        predictions=None,
        *,
        contexts=None,
        base_id: str | os.PathLike | None = None,
        base: "PreTrainedModel | str | os.PathLike | None" = None,
        base_tokenizer: "PreTrainedTokenizerBase | None" = None,
        base_device: "str | torch.device | None" = None,
        base_kwargs: dict | None = None,
        model_id: str | os.PathLike | None = None,
        model: "PreTrainedModel | None" = None,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        device: "str | torch.device | None" = None,
        model_kwargs: dict | None = None,
        trust_remote_code: bool = False,
        preset: str | None = None,
        add_start_token: bool | int = True,
        join_contexts: str = "text",
        max_length: int | None = None,
        window: int | None = None,
        stride: int | None = None,
        start_each_window: bool | None = None,
        positions: bool | Sequence[int] = False,
        conversations: bool = UNSET,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        roles: Sequence[str] = ("assistant",),
        pseudo: str | None = None,
        dtype: str = UNSET,
        backend: str = UNSET,
        batch_size: int | None = None,
        **unknown,
    ) -> list[TextComparison]:
        """Each text token by token under two models: both nll, the KL divergence, and the token
        that each expected most.

        Args, Raises: as for `compare`.
        """
        options = given(Perplexity.compare_tokens, locals(), TextOptions, ModelSource, BaseSource)
        check_texts(predictions)
        texts, options = _with_kind_in(predictions, options)
        sources, text_options = self._sources_and_options(options)
        texts, contexts = _checked_early(
            ALONE, texts, contexts, text_options, batch_size=batch_size
        )
        comparer = self._comparer(*sources, text_options, ALONE)
        if isinstance(comparer, ByteComparer):
            raise ValueError("The two models have different tokens, so none can be compared.")
        shown = self._shows_progress()
        return list(comparer.comparisons(texts, contexts, batch_size=batch_size, progress=shown))

    def text_comparer(
        self,
        *,
        base_id: str | os.PathLike | None = None,
        base: "PreTrainedModel | str | os.PathLike | None" = None,
        base_tokenizer: "PreTrainedTokenizerBase | None" = None,
        base_device: "str | torch.device | None" = None,
        base_kwargs: dict | None = None,
        model_id: str | os.PathLike | None = None,
        model: "PreTrainedModel | None" = None,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        device: "str | torch.device | None" = None,
        model_kwargs: dict | None = None,
        trust_remote_code: bool = False,
        preset: str | None = None,
        add_start_token: bool | int = True,
        join_contexts: str = "text",
        max_length: int | None = None,
        window: int | None = None,
        stride: int | None = None,
        start_each_window: bool | None = None,
        positions: bool | Sequence[int] = False,
        conversations: bool = UNSET,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        roles: Sequence[str] = ("assistant",),
        pseudo: str | None = None,
        dtype: str = UNSET,
        backend: str = UNSET,
        sync: bool = False,
        process_group=None,
        **unknown,
    ) -> TextComparer | ByteComparer:
        """What `compare` uses, for programs that handle texts one by one.

        Args, Raises: as for `compare`.
        """
        options = given(Perplexity.text_comparer, locals(), TextOptions, ModelSource, BaseSource)
        sources, text_options = self._sources_and_options(options)
        return self._comparer(*sources, text_options, Processes.to_sync(sync, process_group))

    def save_base(
        self,
        predictions=None,
        path: str | os.PathLike | None = None,
        *,
        contexts=None,
        model_id: str | os.PathLike | None = None,
        model: "PreTrainedModel | None" = None,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        device: "str | torch.device | None" = None,
        model_kwargs: dict | None = None,
        trust_remote_code: bool = False,
        preset: str | None = None,
        add_start_token: bool | int = True,
        join_contexts: str = "text",
        max_length: int | None = None,
        window: int | None = None,
        stride: int | None = None,
        start_each_window: bool | None = None,
        positions: bool | Sequence[int] = False,
        conversations: bool = UNSET,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        roles: Sequence[str] = ("assistant",),
        pseudo: str | None = None,
        dtype: str = UNSET,
        backend: str = UNSET,
        batch_size: int | None = None,
        **unknown,
    ) -> None:
        """Write a base for `compare(texts, base=path)`, where two models do not fit at once.

        Kept are, for each token, the hidden state that enters the output layer, in the model's
        dtype, and that layer once; logits where no output layer was found. An interrupted call is
        continued by the same call.

        Args:
            predictions: the texts, or conversations.
            path: a directory, which is made.
            All others: as for `compute`; some name the model.

        Raises:
            TypeError, ValueError: as `compute`; or something else is at `path`, a base of other
                texts or settings, or a damaged one.
            OSError: the disk is full, or cannot be written to; what is complete stays.
        """
        options = given(Perplexity.save_base, locals(), TextOptions, ModelSource)
        check_texts(predictions)
        if path is None:
            raise TypeError(
                "path is missing: save_base(texts, path, ...) writes a directory there."
            )
        texts, options = _with_kind_in(predictions, options)
        source, text_options = self._source_and_options(options)
        text_options.refuse_pseudo("save_base")
        check_place(path)
        texts, contexts = _checked_early(
            ALONE, texts, contexts, text_options, batch_size=batch_size
        )
        model_ = self._kept.get(source, ALONE, _check(source, text_options))
        saver = TextSaver(model_, text_options)
        saver.save(path, texts, contexts, batch_size=batch_size, progress=self._shows_progress())

    def _compute_texts(
        self,
        texts,
        contexts,
        groups,
        batch_size: int | None,
        options: dict,
        processes: Processes,
    ) -> Result:
        check_collection(texts, "predictions")
        groups = None if groups is None else checked_groups(groups)
        if self.num_process > 1:
            raise ValueError("Texts and a model are scored by one process; num_process must be 1.")
        with self._pending.all_texts(texts, groups) as (all_texts, all_groups):
            all_texts, options = _with_kind_in(all_texts, options)
            source, text_options = self._source_and_options(options)
            all_texts, contexts = _checked_early(
                processes,
                all_texts,
                contexts,
                text_options,
                groups=all_groups,
                batch_size=batch_size,
            )
            scorer = self._scorer(source, text_options, processes, contexts is not None)
            return corpus_result(
                scorer,
                all_texts,
                contexts,
                all_groups,
                batch_size=batch_size,
                progress=self._shows_progress(),
                processes=processes,
            )

    def _result_of_logits(self, run: Run, options: Options) -> Result | None:
        """The result of all batches; the user is warned of what is odd in it."""
        if self.num_process > 1:
            run_of_all = self._over_files(run.to_sync)
            if run_of_all is None:
                return None
            run = run_of_all
        if run.num_batches == 0:
            raise ValueError(
                "Nothing to compute: pass predictions and references, or call add_batch first."
            )
        if (remark := run.remark()) is not None:
            warn_user(remark)
        return {**run.result(), "signature": options.signature_of(run.dtypes)}

    def _options_of_logits(self, options: dict, contexts, batch_size: int | None) -> Options:
        """The options of this metric with those of a call for logits."""
        options.pop("trust_remote_code", None)  # may stand in every call
        if contexts is not None or batch_size is not None or not options.keys() <= LOGIT_OPTIONS:
            _refuse_those_of_texts(options, contexts=contexts, batch_size=batch_size)
        return replace(self._options, **options) if options else self._options

    def _source_and_options(self, options: dict) -> tuple[ModelSource, TextOptions]:
        """The model of a call, and the options of its texts, checked; nothing is loaded."""
        source, of_texts = split_names(options, ModelSource)
        return ModelSource(**source), self._text_options(of_texts)

    def _sources_and_options(
        self, options: dict
    ) -> tuple[tuple[ModelSource, BaseSource], TextOptions]:
        """The model and the base of a comparison, and the options of its texts, checked."""
        source, base, of_texts = split_names(options, ModelSource, BaseSource)
        text_options = self._text_options(of_texts)
        text_options.refuse_pseudo("compare")
        return (ModelSource(**source), BaseSource(**base)), text_options

    def _text_options(self, options: dict) -> TextOptions:
        own: dict[str, Any] = {"dtype": self._options.dtype, "backend": self._options.backend}
        return TextOptions(**own | options)

    def _scorer(
        self,
        source: ModelSource,
        options: TextOptions,
        processes: Processes,
        with_contexts: bool | None = None,
    ) -> TextScorer:
        check = _check(source, options, with_contexts)
        model = self._kept.get(source, processes, check, kinds_for(options))
        # A rank that refuses its options tells the others, which would wait for it.
        return processes.call_together(TextScorer, model, options)

    def _comparer(
        self,
        source: ModelSource,
        base_source: BaseSource,
        options: TextOptions,
        processes: Processes,
    ) -> TextComparer | ByteComparer:
        # Before the model is loaded, whose own check follows.
        processes.call_together(base_source.check)
        one = self._kept.get(source, processes, _check(source, options))
        if base_source.saved is not None:
            other = SavedBase(base_source.saved, one.device)
            return TextComparer(ModelPair(one, other), options)
        source = base_source.model_source(source, one.tokenizer)
        other = self._kept_base.get(source, processes, _check(source, options))
        if same_tokens(one.tokenizer, other.tokenizer):
            return TextComparer(ModelPair(one, other), options)
        return ByteComparer(TextScorer(one, options), TextScorer(other, options))

    def _check_one_protocol(self) -> None:
        if self.num_process > 1:
            raise ValueError("sync goes by torch.distributed, and num_process by files; use one.")

    # What evaluate's metric, which is made of this class, does in its own way.

    num_process = 1  # that add up their sums over files

    def _over_files(self, run: Run) -> Run | None:
        """The runs of all these processes, added up, on the first; None on the others."""
        raise NotImplementedError

    def _shows_progress(self) -> bool:
        """Whether progress bars are wanted; transformers and huggingface_hub have a switch each."""
        return is_progress_bar_enabled() and not are_progress_bars_disabled()


def _refuse_those_of(kind: type, other: type, options: dict, where: str) -> None:
    """Raises ValueError if a field of one kind of options that the other lacks is among these."""
    own = {field.name for field in fields(kind)} - {field.name for field in fields(other)}
    for name in options:
        if name in own:
            raise ValueError(f"{name}= goes with {where}.")


def _refuse_those_of_texts(options: dict, **others) -> None:
    """Raises ValueError for what a call for logits was given that goes with texts and a model."""
    _refuse_those_of(TextOptions, Options, options, where := "texts and model_id= or model=")
    for name, value in (options | others).items():
        if name not in LOGIT_OPTIONS and value is not None:
            raise ValueError(f"{name}= goes with {where}.")


def _with_kind_in(texts, options: dict) -> tuple[Any, dict]:
    """The texts, and the options with whether they are conversations, if these do not say it."""
    texts, are_conversations = with_kind(texts)
    return texts, {"conversations": are_conversations} | options


def _checked_early(processes: Processes, texts, contexts, *given, **options) -> tuple[Any, Any]:
    """The texts and contexts, checked on all processes that share them; if one refuses, all do.

    Where more run than these, they may hold the model together, and a rank that refuses its texts
    here would leave others waiting in it. The scorer, which knows them, refuses then.
    """
    if processes.size < num_launched():
        return texts, contexts
    check = functools.partial(checked_texts, texts, contexts, *given, **options)
    return processes.call_together(check)


def _check(source: ModelSource, options: TextOptions, with_contexts: bool | None = None) -> Check:
    """What refuses a model for these texts before it is loaded."""
    return lambda kind, tokenizer: READERS[kind].check_use(
        source.name, tokenizer, options, with_contexts
    )
