"""One table of everything in which other people's perplexities differ from this module's.

A new preset is one more entry of PRESETS. No other code knows their names.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ppleval.texts.windows import (
    CutIntoWindows,
    Window,
    chunk_windows,
    recipe_windows,
    sliding_windows,
)


def whole_texts(num_ids: int, window: int, stride: int, first: int) -> Iterator[Window]:
    """Each text at once.

    Raises:
        ValueError: a text longer than the window.
    """
    if num_ids > window:
        raise ValueError(
            f"A text has {num_ids} tokens, more than the model's context of {window}: "
            'preset="evaluate" scores each text at once. Pass max_length to cut the texts, '
            "or no preset to score them whole."
        )
    return sliding_windows(num_ids, window, window, first)


def recipe(num_ids: int, window: int, stride: int, first: int) -> Iterator[Window]:
    """The windows of the transformers documentation, with its weights."""
    return recipe_windows(num_ids, window, stride)


def second_halves(num_ids: int, window: int, stride: int, first: int) -> Iterator[Window]:
    """The second half of each chunk; like llama.cpp, at least two chunks.

    Raises:
        ValueError: fewer than two chunks.
    """
    if num_ids < 2 * window:
        raise ValueError(
            f'preset="llama.cpp" needs two chunks of {window} tokens at least, as the tool does; '
            f"the texts have {num_ids} tokens. Pass more text or a smaller window."
        )
    return chunk_windows(num_ids, window, window // 2 + 1)


def whole_chunks(num_ids: int, window: int, stride: int, first: int) -> Iterator[Window]:
    """Disjoint chunks. The first token of each conditions and is not scored.

    Raises:
        ValueError: fewer tokens than one chunk.
    """
    if num_ids < window:
        raise ValueError(
            f'preset="gptq" needs a chunk of {window} tokens at least; the texts have {num_ids}. '
            "Pass more text or a smaller window."
        )
    return chunk_windows(num_ids, window, 1)


def words(text: str) -> int:
    """The number of words between white space."""
    return len(text.split())


def words_of_lm_eval(text: str) -> int:
    """The number of words, plus an empty word at a blank start and at a blank end."""
    return len(re.split(r"\s+", text))


@dataclass(frozen=True)
class Preset:
    """Everything that can differ. The defaults are this module's own way."""

    # Texts
    joint: str | None = None  # joins all texts into one; None keeps them apart
    drops_line_end: bool = False  # drops one line end from the end of the joined text
    takes_contexts: bool = False
    # Special tokens
    puts_start_token: bool = True  # before each text, as add_start_token says
    start_token_twice: bool = False  # also before a text that begins with it
    start_token_as_tokenizer: bool = False  # only if the tokenizer puts one by itself
    eos_without_bos: bool = False  # EOS is the start token if the tokenizer has no BOS
    tokenizer_adds: bool = False  # the tokenizer adds its special tokens, unless the text has them
    spelt_tokens_are_text: bool = False  # a text that spells a special token means the characters
    # Windows
    windows: CutIntoWindows = sliding_windows
    longest_window: int | None = None  # the default window's bound; None for the model's context
    stride_is_window: bool = False  # the default stride is the window, not half of it
    drops_tail: bool = False  # tokens behind the last whole chunk are not scored
    starts_each_window: bool = False  # the start token replaces the first id of a later window
    # Counts
    counts_whole_text: bool = False  # counts bytes and words of the unscored part, too
    count_words: Callable[[str], int] = words
    tokens_are_independent: bool = False  # also reports a standard error that assumes this
    # Options that change nothing
    without: tuple[str, ...] = ()


PRESETS = {
    # This module's own.
    None: Preset(takes_contexts=True, starts_each_window=True),
    # The metric that evaluate.load("perplexity") downloads.
    "evaluate": Preset(
        takes_contexts=True,
        start_token_twice=True,
        windows=whole_texts,
        without=("window", "stride", "start_each_window"),
    ),
    # lm-evaluation-harness, loglikelihood_rolling.
    "lm-eval": Preset(
        start_token_twice=True,
        eos_without_bos=True,
        tokenizer_adds=True,
        stride_is_window=True,
        counts_whole_text=True,
        count_words=words_of_lm_eval,
        without=("stride", "max_length", "start_each_window"),
    ),
    # https://huggingface.co/docs/transformers/perplexity
    "hf-docs": Preset(
        joint="\n\n",
        puts_start_token=False,
        tokenizer_adds=True,
        windows=recipe,
        without=("max_length", "start_each_window"),
    ),
    # What papers on quantisation and pruning print, after opt.py and datautils.py of
    # IST-DASLab/gptq: the mean of the chunks' means, which is that of all scored tokens.
    "gptq": Preset(
        joint="\n\n",
        puts_start_token=False,
        tokenizer_adds=True,
        windows=whole_chunks,
        longest_window=2048,
        drops_tail=True,
        without=("stride", "max_length", "start_each_window"),
    ),
    # llama-perplexity; tools/perplexity/perplexity.cpp in ggml-org/llama.cpp.
    "llama.cpp": Preset(
        joint="\n",
        drops_line_end=True,
        start_token_twice=True,
        start_token_as_tokenizer=True,
        spelt_tokens_are_text=True,
        windows=second_halves,
        drops_tail=True,
        starts_each_window=True,
        tokens_are_independent=True,
        without=("stride", "max_length", "start_each_window"),
    ),
}
