"""Evaluates small random models with Trainer in every setting; tests/test_trainer.py reads it.

    PYTHONPATH=.:tests python tests/workers/trainer.py OUT.json

It may be one of several ranks; rank 0 writes. OUT.json is
{setting: {model: {batch size: [[value, expected], ...]}}}: perplexities of evaluations in a row,
with those of a loop over the rows in float64; for flattened batches their sequences, too, and with
groups those of each group.
"""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import PartialState
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorWithFlattening,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from transformers.utils import ModelOutput

from ppleval import Perplexity

VOCAB_SIZE = 97
NUM_ROWS = 11  # divided by none of the batch sizes, nor by two processes
SMALL = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "intermediate_size": 24}
HEADS = {"num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.5}


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB_SIZE,
            n_embd=16,
            n_layer=1,
            n_head=2,
            n_positions=64,
            initializer_range=0.5,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SMALL, **HEADS))


def mixtral() -> MixtralForCausalLM:
    """Its outputs hold an aux_loss in front of the logits."""
    return MixtralForCausalLM(
        MixtralConfig(
            **SMALL,
            **HEADS,
            num_key_value_heads=2,
            num_local_experts=2,
            output_router_logits=True,
        )
    )


class HiddenStatesFirst(LlamaForCausalLM):
    """Its outputs hold hidden states in front of the logits."""

    def forward(self, input_ids, attention_mask=None, labels=None) -> ModelOutput:
        outputs = super().forward(
            input_ids, attention_mask, labels=labels, output_hidden_states=True
        )
        hidden = {"hidden": outputs.hidden_states[-1], "logits": outputs.logits}
        return ModelOutput(hidden if labels is None else {"loss": outputs.loss, **hidden})


def hidden_states_first() -> HiddenStatesFirst:
    return HiddenStatesFirst(LlamaConfig(**SMALL, **HEADS))


def bert() -> BertForMaskedLM:
    return BertForMaskedLM(BertConfig(**SMALL, **HEADS))


def t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB_SIZE,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
            initializer_factor=3.0,
        )
    )


def make_rows(shift: bool, seed: int = 0) -> list[dict]:
    """Rows of 3 to 20 tokens, in which some labels, here and there, are not to be scored."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(NUM_ROWS):
        ids = rng.integers(1, VOCAB_SIZE, rng.integers(3, 21))
        labels = ids if shift else rng.integers(1, VOCAB_SIZE, len(ids))
        labels = np.where(rng.random(len(ids)) < 0.2, -100, labels)
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return rows


def collate(rows: list[dict], length: int | None = None) -> dict[str, torch.Tensor]:
    """Padded on the right, labels with -100, to `length` or else to the longest row."""
    length = length or max(len(row["input_ids"]) for row in rows)

    def padded(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (length - len(values))

    return {
        "input_ids": torch.tensor([padded(row["input_ids"], 0) for row in rows]),
        "labels": torch.tensor([padded(row["labels"], -100) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row["labels"]), 0) for row in rows]),
    }


class PackingCollator:
    """What TRL's SFTTrainer makes of examples that each hold several documents (`seq_lengths`)."""

    padding_free = True

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        documents = [
            {"input_ids": ids, "labels": labels}
            for example in examples
            for ids, labels in zip(
                split(example["input_ids"], example["seq_lengths"]),
                split(example["labels"], example["seq_lengths"]),
                strict=True,
            )
        ]
        return DataCollatorWithFlattening()(documents)


def split(values: list[int], lengths: list[int]) -> list[list[int]]:
    ends = np.cumsum(lengths).tolist()
    return [values[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def pack(rows: list[dict], size: int = 3) -> list[dict]:
    """Examples of `size` documents each, one behind the other."""
    packs = [rows[at : at + size] for at in range(0, len(rows), size)]
    return [
        {
            "input_ids": [token for row in pack for token in row["input_ids"]],
            "labels": [label for row in pack for label in row["labels"]],
            "seq_lengths": [len(row["input_ids"]) for row in pack],
        }
        for pack in packs
    ]


@torch.no_grad()
def expected_sequences(model, rows: list[dict]) -> dict[str, float]:
    """Number of sequences and interval where each row is a sequence by itself."""
    ppl = Perplexity(shift=True)
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits
        ppl.add_batch(predictions=logits, references=[row["labels"]])
    names = ("num_sequences", "perplexity_ci_low", "perplexity_ci_high")
    result = ppl.compute()
    return {name: result[name] for name in names}


@torch.no_grad()
def expected_perplexity(model, rows: list[dict], shift: bool, batch_size: int) -> float:
    """Row by row, in float64.

    Each row goes through the model by itself, except in bfloat16, where logits depend on the batch.
    """
    batch_size = batch_size if model.dtype == torch.bfloat16 else 1
    nll_sum, num_tokens = 0.0, 0
    for at in range(0, len(rows), batch_size):
        batch = rows[at : at + batch_size]
        if PartialState().num_processes > 1:  # which fills up the last batch with the first rows
            batch = (batch + rows)[:batch_size]
        for row, logits in zip(rows[at:], model(**collate(batch)).logits.double(), strict=False):
            targets = torch.tensor(row["labels"])
            logits = logits[: len(targets)]
            if shift:
                logits, targets = logits[:-1], targets[1:]
            nll_sum += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
            num_tokens += int((targets != -100).sum())
    return float(np.exp(nll_sum / num_tokens))


CAUSAL = {"GPT-2": gpt2, "Llama": llama}
# name: (models, shift, arguments of TrainingArguments)
SETTINGS = {
    "plain": (CAUSAL, True, {}),
    "batch_eval_metrics": (CAUSAL, True, {"batch_eval_metrics": True}),
    "no concatenation": (CAUSAL, True, {"eval_do_concat_batches": False}),
    "accumulation steps": (CAUSAL, True, {"eval_accumulation_steps": 1}),
    "lists, accumulated": (
        CAUSAL,
        True,
        {"eval_do_concat_batches": False, "eval_accumulation_steps": 2},
    ),
    "inputs and losses": (CAUSAL, True, {"include_for_metrics": ["inputs", "loss"]}),
    "all of it by batch": (
        CAUSAL,
        True,
        {"batch_eval_metrics": True, "include_for_metrics": ["inputs", "loss"]},
    ),
    "hidden states": (CAUSAL, True, {}),
    "bf16": (CAUSAL, True, {"bf16_full_eval": True}),
    "predict": (CAUSAL, True, {}),
    "predict by batch": (CAUSAL, True, {"batch_eval_metrics": True}),
    "several datasets": (CAUSAL, True, {}),
    "streamed": (CAUSAL, True, {}),
    "while training": (CAUSAL, True, {}),
    "plain dataloader, while training": (CAUSAL, True, {}),
    "plain dataloader by batch, while training": (CAUSAL, True, {"batch_eval_metrics": True}),
    "own compute_metrics": (CAUSAL, True, {}),
    "aux_loss": ({"Mixtral": mixtral}, True, {}),
    "hidden states first": ({"Llama": hidden_states_first}, True, {}),
    "masked": ({"BERT": bert}, False, {}),
    "encoder-decoder": ({"T5": t5}, False, {}),
    "dispatched": (
        {"Llama": llama},
        True,
        {"accelerator_config": {"dispatch_batches": True, "even_batches": False}},
    ),
    "flattened": ({"Llama": llama}, True, {}),
    "flattened by batch": ({"Llama": llama}, True, {"batch_eval_metrics": True}),
    "flattened by a function": ({"Llama": llama}, True, {}),
    "packed": ({"Llama": llama}, True, {"remove_unused_columns": False}),
    "groups": ({"Llama": llama}, True, {}),
    "groups by batch": ({"Llama": llama}, True, {"batch_eval_metrics": True}),
    "groups, no concatenation": ({"Llama": llama}, True, {"eval_do_concat_batches": False}),
    "groups, encoder-decoder": ({"T5": t5}, False, {}),
    "groups by length": ({"Llama": llama}, True, {"train_sampling_strategy": "group_by_length"}),
}
GROUPS = ["law", "code", "law", "news", "code", "law", "law", "code", "law", "news", "code"]
EQUAL_LENGTHS = partial(collate, length=24)  # for one process that reads the batches of all
COLLATORS = {
    "streamed": EQUAL_LENGTHS,
    "dispatched": EQUAL_LENGTHS,
    "flattened": DataCollatorWithFlattening(),
    "flattened by batch": DataCollatorWithFlattening(),
    "flattened by a function": lambda rows: DataCollatorWithFlattening()(rows),
    "packed": PackingCollator(),
}


def make_trainer(setting: str, model, shift: bool, batch_size: int, extra: dict, directory: str):
    """A Trainer as a user would write it."""
    ppl = Perplexity()
    arguments = {
        "output_dir": directory,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "per_device_eval_batch_size": batch_size,
        **extra,
    }
    groups = GROUPS if setting.startswith("groups") else None
    hooks = ppl.trainer_hooks(groups=groups)
    if setting == "own compute_metrics":

        def compute_metrics(prediction) -> dict:
            result = ppl.compute(
                predictions=prediction.predictions, references=prediction.label_ids, shift=shift
            )
            del result["signature"]  # Trainer logs numbers
            return result

        hooks = {"compute_metrics": compute_metrics}
    trainer_class, arguments_class = Trainer, TrainingArguments
    if setting.endswith("encoder-decoder"):
        trainer_class, arguments_class = Seq2SeqTrainer, Seq2SeqTrainingArguments
    if setting.endswith("while training"):
        arguments |= {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
        arguments |= {"learning_rate": 0.0, "save_strategy": "no"}
    trainer = trainer_class(
        model=model,
        args=arguments_class(**arguments),
        train_dataset=make_rows(shift, seed=2),
        eval_dataset=make_rows(shift, seed=0),
        data_collator=COLLATORS.get(setting, collate),
        **hooks,
    )
    if setting.startswith("plain dataloader"):
        dataloader = DataLoader(trainer.eval_dataset, batch_size, collate_fn=collate)
        trainer.get_eval_dataloader = lambda eval_dataset=None: dataloader
    return trainer


def evaluate_in(setting: str, make_model, shift: bool, batch_size: int, extra: dict) -> list:
    """Pairs of perplexity and expected perplexity, of evaluations in a row."""
    torch.manual_seed(0)
    model = make_model().eval()
    if setting == "hidden states":
        model.config.output_hidden_states = True
    rows = {"a": make_rows(shift, seed=0), "b": make_rows(shift, seed=1)[:-4]}
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(setting, model, shift, batch_size, extra, directory)
        if setting.endswith("while training"):
            trainer.train()
            values = [log["eval_perplexity"] for log in trainer.state.log_history[:2]]
            names = ["a", "a"]
        elif setting == "several datasets":
            metrics = trainer.evaluate(rows) | trainer.evaluate({"again": rows["b"]})
            values = [metrics[f"eval_{name}_perplexity"] for name in ("a", "b", "again")]
            names = ["a", "b", "b"]
        elif setting.startswith("predict"):
            names = ["a", "b"]
            values = [trainer.predict(rows[n]).metrics["test_perplexity"] for n in names]
        elif setting.startswith(("flattened", "packed")):
            return evaluate_flattened(trainer, rows, model)
        elif setting.startswith("groups"):
            return evaluate_groups(trainer, rows, model, shift)
        else:
            names = ["a", "b", "a"]
            data = {
                name: datasets.IterableDataset.from_generator(lambda part=part: iter(part))
                if setting == "streamed"
                else part
                for name, part in rows.items()
            }
            values = [trainer.evaluate(data[name])["eval_perplexity"] for name in names]
        model.eval()
        expected = {
            name: expected_perplexity(model, rows[name], shift, batch_size) for name in {*names}
        }
        return [(value, expected[name]) for value, name in zip(values, names, strict=True)]


def evaluate_flattened(trainer, rows: dict[str, list[dict]], model) -> list:
    """Pairs of perplexity, number of sequences and interval, and those of each row by itself."""
    pairs = []
    for part in rows.values():
        data = pack(part) if isinstance(trainer.data_collator, PackingCollator) else part
        expected = expected_sequences(model.eval(), part)
        expected["perplexity"] = expected_perplexity(model, part, True, 1)
        found = trainer.evaluate(data)
        pairs += [(found[f"eval_{name}"], value) for name, value in expected.items()]
    return pairs


def evaluate_groups(trainer, rows: dict[str, list[dict]], model, shift: bool) -> list:
    """Pairs of what is reported and expected of each group, twice; also of a set without groups."""
    first, again = trainer.evaluate(rows["a"]), trainer.evaluate(rows["a"])
    known = trainer.args.train_sampling_strategy != "group_by_length"
    parts = {
        name: [row for row, group in zip(rows["a"], GROUPS, strict=True) if group == name]
        for name in GROUPS
        if known
    }
    model.eval()
    expected = {n: expected_perplexity(model, part, shift, 1) for n, part in parts.items()}
    mean_nll = {f"eval_mean_nll_{name}": float(np.log(value)) for name, value in expected.items()}
    values = {f"eval_perplexity_{name}": value for name, value in expected.items()} | mean_nll
    if known:
        values["eval_macro_mean_nll"] = float(np.mean([*mean_nll.values()]))
        values["eval_macro_perplexity"] = float(np.exp(values["eval_macro_mean_nll"]))
    values["eval_perplexity"] = expected_perplexity(model, rows["a"], shift, 1)
    pairs = [(metrics[name], value) for metrics in (first, again) for name, value in values.items()]
    shorter = trainer.evaluate(rows["b"])  # than the names
    return [*pairs, (len(first), len(shorter) + len(values) - 1)]


def main() -> None:
    results = {
        setting: {
            name: {
                batch_size: evaluate_in(setting, make_model, shift, batch_size, extra)
                for batch_size in (1, 5)
            }
            for name, make_model in models.items()
        }
        for setting, (models, shift, extra) in SETTINGS.items()
    }
    if PartialState().is_main_process:
        Path(sys.argv[1]).write_text(json.dumps(results))
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
