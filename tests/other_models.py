"""What the tests of masked models and encoder-decoders share: tiny models, and plain loops."""

import pytest
import torch
import transformers
from support import WITH_NETWORK
from text_oracles import grown
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CONTEXT = 24
needs_network = pytest.mark.skipif(
    not WITH_NETWORK, reason="downloads a model; set PERPLEXITY_TEST_NETWORK=1"
)
CORPUS = [
    "The cat sat on the mat, and the dog was playing in the garden.",
    "A happy child is reading a long book about unhappiness.",
    "I can't believe they're walking to the market!",
    "Language models assign probabilities to sentences; a naïve façade.",
] * 3
TEXTS = [
    "The unhappy child can't sleep.",
    "Playing!",
    "a",
    "The cat was reading about the probabilities of a naïve garden, walking on a long mat.",
    "They're unbelievable — walkings, mats and dogs.",
]
SPECIAL = {
    "bert": {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
    "roberta": {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"},
    "t5": {"pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>", "additional": "en_XX"},
}
AROUND = {
    "bert": "[CLS] $A [SEP]",
    "roberta": "<s> $A </s>",
    "t5": "$A </s>",
    "mbart": "$A </s> en_XX",
}


def make_tokenizer(kind, around=None):
    """WordPiece ("bert"), byte-level BPE ("roberta") or sentencepiece's Unigram ("t5")."""
    special = SPECIAL[kind]
    names, quiet = list(special.values()), {"show_progress": False}
    if kind == "bert":
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=110, special_tokens=names, **quiet)
    elif kind == "roberta":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=names,
            **quiet,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
    else:
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=90, unk_token="<unk>", special_tokens=names, **quiet
        )
    made.train_from_iterator(CORPUS, trainer)
    around = AROUND[kind] if around is None else around
    ids = [(name, made.token_to_id(name)) for name in around.split() if name != "$A"]
    made.post_processor = processors.TemplateProcessing(around, special_tokens=ids)
    named = {f"{n}_token": token for n, token in special.items() if n != "additional"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **named)


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": CONTEXT,
}


def masked_config(name, tokenizer):
    common = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    sizes = SIZES | common
    if name == "roberta":  # its positions begin behind the padding id
        positions = CONTEXT + 1 + tokenizer.pad_token_id
        return transformers.RobertaConfig(**sizes | {"max_position_embeddings": positions})
    if name == "deberta":
        relative = {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "max_relative_positions": 8,
        }
        return transformers.DebertaV2Config(**sizes, **relative, position_buckets=4)
    if name == "electra":
        return transformers.ElectraConfig(**sizes, embedding_size=16)
    return transformers.BertConfig(**sizes)


MASKED = {"bert": "bert", "roberta": "roberta", "deberta": "t5", "electra": "bert"}


def make_masked(name):
    """(model, tokenizer)"""
    around = "<mask> $A </s>" if name == "deberta" else None  # any special tokens will do
    tokenizer = make_tokenizer(MASKED[name], around)
    torch.manual_seed(0)
    config = masked_config(name, tokenizer)
    return grown(transformers.AutoModelForMaskedLM.from_config(config)), tokenizer


def masked_nll(model, ids, special, mask_id, at, ends, room):
    """Oracle: nll of ids[at], with ids[at:ends[at]] masked, in a window of `room` ids around it."""
    head, tail = special
    size = min(room, len(ids))
    start = min(max(0, at - size // 2), len(ids) - size)
    masked = [mask_id if at <= i < ends[at] else ids[i] for i in range(start, start + size)]
    with torch.no_grad():
        logits = model(torch.tensor([[*head, *masked, *tail]])).logits[0].double()
    return -logits.log_softmax(-1)[len(head) + at - start, ids[at]].item()


def seq2seq_config(name, tokenizer):
    ids = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
    }
    if name == "t5":
        return transformers.T5Config(
            **ids, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, n_positions=CONTEXT
        )
    if name == "t5gemma":
        sizes = {**SIZES, **ids, "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 0}
        return transformers.T5GemmaConfig(encoder=sizes, decoder=sizes, vocab_size=len(tokenizer))
    if name == "bert2bert":
        halves = [
            transformers.BertConfig(**SIZES, vocab_size=len(tokenizer), **of_decoder)
            for of_decoder in ({}, {"is_decoder": True, "add_cross_attention": True})
        ]
        made = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*halves)
        made.pad_token_id = tokenizer.pad_token_id
        made.decoder_start_token_id = tokenizer.cls_token_id
        return made
    kinds = {
        "bart": transformers.BartConfig,
        "marian": transformers.MarianConfig,
        "mbart": transformers.MBartConfig,
        "m2m100": transformers.M2M100Config,  # whose class has no way to shift labels
    }
    layers = {
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
    }
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return kinds[name](
        **ids,
        **layers,
        **heads,
        d_model=32,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        forced_eos_token_id=None,
    )


SEQ2SEQ = {"t5": "t5", "bart": "roberta", "marian": "t5", "mbart": "t5", "m2m100": "t5"}
SEQ2SEQ |= {"t5gemma": "t5", "bert2bert": "bert"}


def make_seq2seq(name):
    """(model, tokenizer)"""
    tokenizer = make_tokenizer(SEQ2SEQ[name], AROUND["mbart"] if name == "mbart" else None)
    torch.manual_seed(0)
    model = transformers.AutoModelForSeq2SeqLM.from_config(seq2seq_config(name, tokenizer))
    if name == "marian":
        model.final_logits_bias.normal_()
    return grown(model), tokenizer


def labels_nll(model, tokenizer, source, text, limit=CONTEXT):
    """Oracle: nll of each label of a text given its source, with labels= of the model itself."""
    source = torch.tensor([tokenizer(source, truncation=True, max_length=limit).input_ids])
    labels = torch.tensor([tokenizer(text_target=text).input_ids])
    with torch.no_grad():
        logits = model(input_ids=source, labels=labels).logits[0].double()
    return -logits.log_softmax(-1)[torch.arange(labels.shape[1]), labels[0]]
