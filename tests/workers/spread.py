"""What the metric does with models that several ranks hold together; tests/test_text_ranks.py
reads it.

    PYTHONPATH=.:tests python tests/workers/spread.py LLAMA OUT [KIND]

LLAMA is the directory of a small model. Rank r writes OUT.r, a JSON object of {kind of model:
{case: result or error}}. With a KIND only that one runs, the last rank dies in the middle, and the
others write what they get.
"""

import functools
import itertools
import json
import os
import re
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DataLoaderConfiguration, ParallelismConfig
from accelerate.state import AcceleratorState
from support import ROOT
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from workers import trainer

from ppleval import Perplexity, distributed

# Of very unequal length, and one that has nothing to score.
TEXTS = ["Return the number of items in the list.", "", "The cat. " * 300, "No.", "naïve 漢字 🎉"]


ROWS = trainer.make_rows(shift=True)
ROW_NAMES = ["even" if row % 2 == 0 else "odd" for row in range(len(ROWS))]


@functools.cache
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "tiny_model")


def whole(family: str):
    """A model that one process holds, equal on all."""
    if family == "llama":
        return AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
    torch.manual_seed(0)
    if family == "three heads":
        sizes = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 1}
        return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer()), **sizes)).eval()
    sizes = {"vocab_size": len(tokenizer()), "n_positions": 64, "n_embd": 32, "n_layer": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, n_head=2)).eval()


# --- the ways in which a model is spread ----------------------------------------------------------


def planned(**sizes):
    """transformers' own way."""
    return AutoModelForCausalLM.from_pretrained(sys.argv[1], distributed_config=sizes)


def tensor_parallel(family: str, mesh, outputs=None, is_local: bool = True):
    """torch's own way. Of a GPT-2 the output layer alone is one that torch can spread."""
    model = whole(family)
    columns = ("up_proj", "gate_proj", "q_proj", "k_proj", "v_proj")
    kinds = {name: ColwiseParallel() for name in columns}
    kinds |= {"down_proj": RowwiseParallel(), "o_proj": RowwiseParallel()}
    kinds["lm_head"] = ColwiseParallel(output_layouts=outputs, use_local_output=is_local)
    names = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in kinds]
    plan = {name: kinds[name.rpartition(".")[2]] for name in names}
    return parallelize_module(model, mesh, plan)


def fsdp1(family: str, *wrapped: type, **options):
    """The layers of these types are wrapped, too, each by itself."""
    kinds = {"device_id": torch.device("cpu"), "use_orig_params": True} | options
    if wrapped:
        kinds["auto_wrap_policy"] = ModuleWrapPolicy(wrapped)
    return FullyShardedDataParallel(whole(family), **kinds)


def fsdp2(family: str, mesh, always: bool = False):
    """With `always` no weight stays gathered behind its layer."""
    model = whole(family)
    layers = model.model.layers if family == "llama" else model.transformer.h
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh, reshard_after_forward=always or None)


def mixed() -> dict:
    """Weights in float32, which are bfloat16 in a forward pass."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    return {
        "FSDP 1": fsdp1("llama", mixed_precision=MixedPrecision(param_dtype=torch.bfloat16)),
        "FSDP 2": fully_shard(whole("llama"), reshard_after_forward=True, mp_policy=policy),
    }


def all_ranks():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def squared(*names):
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=names)


def hybrid():
    mesh = squared("copies", "shards")
    return fsdp1("llama", device_mesh=mesh, sharding_strategy=ShardingStrategy.HYBRID_SHARD)


ON_TWO = {
    "tensor parallel, planned": lambda: planned(tp_size=2),
    "tensor parallel": lambda: tensor_parallel("llama", all_ranks(), Replicate()),
    "tensor parallel, GPT-2": lambda: tensor_parallel("gpt2", all_ranks(), Replicate()),
    "tensor parallel, logits that are DTensors": lambda: tensor_parallel(
        "llama", all_ranks(), is_local=False
    ),
    "pipeline": lambda: planned(pp_size=2),
    "FSDP 1": lambda: fsdp1("llama", torch.nn.Linear),
    "FSDP 1, flat, GPT-2": lambda: fsdp1("gpt2", use_orig_params=False),
    "FSDP 2": lambda: fsdp2("llama", all_ranks(), always=True),
    "FSDP 2, GPT-2": lambda: fsdp2("gpt2", all_ranks()),
    "FSDP 2, planned": lambda: planned(fsdp_size=2),
}
ON_FOUR = {
    "tensor parallel, two copies, planned": lambda: planned(tp_size=2, dp_replicate_size=2),
    "tensor parallel, two copies": lambda: tensor_parallel(
        "llama", squared("copies", "work")["work"], Replicate()
    ),
    "tensor parallel, GPT-2": lambda: tensor_parallel("gpt2", all_ranks(), Replicate()),
    "FSDP 1, two copies": hybrid,
    "FSDP 2": lambda: fsdp2("llama", all_ranks()),
    "FSDP 2, GPT-2, two copies": lambda: fsdp2("gpt2", squared("copies", "shards")),
    "FSDP 2 and tensor parallel, planned": lambda: planned(tp_size=2, fsdp_size=2),
}
MODELS = {2: ON_TWO, 4: ON_FOUR}


def cases(kind: str, model, rank: int) -> dict:
    """{name: result} of one model."""
    named = {"model": model, "tokenizer": tokenizer()}
    ppl, shapes = Perplexity(), []
    hook = model.register_forward_hook(lambda *call: shapes.append(call[-1].logits.shape[:2]))
    found: dict[str, Any] = {
        "shared": ppl.compute(predictions=TEXTS, **named, sync=True),
        "one text": ppl.compute(predictions=TEXTS[:1], **named, sync=True),
        "alone": ppl.compute(predictions=TEXTS[:2], **named),
    }
    found["rows of logits"] = shapes[-1].numel()
    hook.remove()
    if kind.startswith("FSDP") and "parallel" not in kind:
        own = own_texts(rank)
        found["own"] = ppl.compute(predictions=own, **named, batch_size=1)
    if kind in ("tensor parallel", "FSDP 2"):
        found["compared"] = ppl.compare(TEXTS, base=whole("llama"), **named, sync=True)
        found["a bad text on one"] = attempt(ppl.compute, predictions=["good", rank or ""], **named)
        found["compared with itself"] = attempt(
            ppl.compare, TEXTS[:1], base=model, **named, sync=True
        )
        found["saved"] = attempt(ppl.save_base, TEXTS, "unused", **named)
    if "planned" in kind:
        found["evaluated"] = evaluations(model)
    if kind == "FSDP 2":
        found["loop"] = loop_of_the_docs(model)
    if dist.get_world_size() == 4 and kind in ("FSDP 2", "tensor parallel, two copies"):
        # Of two ranks that are not those of one copy.
        groups = [dist.new_group([i, i + 2]) for i in range(2)]
        options = {**named, "sync": True, "process_group": groups[rank % 2]}
        found["in groups"] = attempt(ppl.compute, predictions=TEXTS, **options)
        found["other texts in one group"] = attempt(
            ppl.compute, predictions=TEXTS[rank % 2 :], **options
        )
    if kind == "tensor parallel":
        found["other texts on one"] = attempt(ppl.compute, predictions=TEXTS[rank:], **named)
    return found


def evaluations(model) -> list[dict]:
    """What a Trainer reports of 11 rows in batches of 2, where accelerate tells which processes
    read the same ones, and where a process_group does."""
    AcceleratorState._reset_state()
    # accelerate wants GPUs for it, although nothing in an evaluation needs one.
    ParallelismConfig._validate_accelerator = lambda *_: None
    os.environ["ACCELERATE_USE_CPU"] = "true"
    size = model.config.distributed_config.tp_size
    groups = [dist.new_group([*range(i, dist.get_world_size(), size)]) for i in range(size)]
    found = []
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory, per_device_eval_batch_size=2, report_to=[], save_strategy="no", use_cpu=True
        )
        for group in (None, groups[dist.get_rank() % size]):
            hooks = Perplexity().trainer_hooks(groups=ROW_NAMES, process_group=group)
            data = {"eval_dataset": ROWS, "data_collator": trainer.collate}
            made = Trainer(model=model, args=arguments, **data, **hooks)
            if group is not None:
                AcceleratorState._shared_state["parallelism_config"] = None
            found.append(made.evaluate())
    return found


def loop_of_the_docs(model) -> dict:
    """Where the last rank has fewer batches than the others, on two ranks none."""
    page = (ROOT / "docs" / "processes.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(import itertools\n.*?)```", page, flags=re.DOTALL)
    AcceleratorState._reset_state()
    config = DataLoaderConfiguration(even_batches=False)
    batch_size = 2 if dist.get_world_size() > 2 else len(ROWS)
    loader = torch.utils.data.DataLoader(ROWS, batch_size, collate_fn=trainer.collate)
    names = {"accelerator": Accelerator(cpu=True, dataloader_config=config), "loader": loader}
    names |= {"torch": torch, "model": model, "ppl": Perplexity(shift=True)}
    exec(block, names)
    return names["result"]


def own_texts(rank: int) -> list[str]:
    """More batches on each rank than on the one before."""
    return [TEXTS[2][:600]] * (1 + 2 * rank)


def attempt(function, *args, **options):
    try:
        return function(*args, **options)
    except (ValueError, TypeError, ConnectionError) as error:
        return f"{type(error).__name__}: {error}"


def other_cases(rank: int) -> dict:
    """What needs none of these models."""
    ppl = Perplexity()
    groups = [dist.new_group([r, r + 1]) for r in range(0, dist.get_world_size(), 2)]
    group = groups[rank // 2]
    add(ppl, rank)
    found = {"computed": ppl.compute(sync=True, process_group=group)}
    add(ppl, rank)
    ppl.sync(process_group=group)
    found["synced"] = ppl.compute()
    named = {"predictions": TEXTS[rank // 2 :], "model_id": sys.argv[1]}
    found["texts"] = ppl.compute(**named, sync=True, process_group=group)
    window = 16 if rank == 0 else 10**6
    found["window"] = attempt(ppl.compute, **named, sync=True, window=window)
    other = {"model": whole("llama"), "tokenizer": 5 if rank else tokenizer(), "sync": True}
    found["tokenizer"] = attempt(ppl.compute, predictions=TEXTS, **other)
    found["without sync"] = attempt(ppl.compute, **named, process_group=group)
    found["no group"] = attempt(ppl.sync, process_group=[0, 1])
    if len(groups) > 1:
        found["group of others"] = attempt(ppl.sync, process_group=groups[rank // 2 - 1])
    for name, model in mixed().items():
        scorer = ppl.text_scorer(model=model, tokenizer=tokenizer())
        found[f"mixed, {name}"] = [
            scorer.model.settings()["model_dtype"],
            scorer.model.takes_batches,
        ]
    part = tensor_parallel("llama", all_ranks())
    named = {"predictions": TEXTS, "model": part, "tokenizer": tokenizer()}
    found["part of the logits"] = attempt(ppl.compute, **named)
    named["model"] = tensor_parallel("three heads", all_ranks(), Replicate())
    found["three heads"] = attempt(ppl.compute, **named)
    return found


def add(ppl, rank: int) -> None:
    """Logits of their own on each rank."""
    logits = torch.randn(2, 3, 5, generator=torch.manual_seed(rank))
    ppl.add_batch(predictions=logits, references=torch.zeros(2, 3, dtype=torch.long))


def dying(model, rank: int):
    """The result of texts of which the last rank does not see the end."""
    scorer = Perplexity().text_scorer(model=model, tokenizer=tokenizer())
    passes = itertools.count()

    def die(*_):
        if rank == dist.get_world_size() - 1 and next(passes) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    scorer.model.model.register_forward_pre_hook(die)
    everyone = distributed.Processes.launched()
    return attempt(lambda: len(list(scorer.sums(TEXTS[2:3] * 50, processes=everyone))))


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    _, _, out, *kinds = sys.argv
    models = MODELS[dist.get_world_size()]
    if kinds:
        results: Any = dying(models[kinds[0]](), rank)
    else:
        results = {kind: cases(kind, make(), rank) for kind, make in models.items()}
        results["others"] = other_cases(rank)
    Path(f"{out}.{rank}").write_text(json.dumps(results))
    if not kinds:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # a group that lost a rank waits for it in its destructor
