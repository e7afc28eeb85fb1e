"""What in a result of texts is not that of the loop of fuzz_text_loop.py."""

import math

import numpy as np
from fuzz_oracle import Scored, exp_or_inf, is_near, mean_nll, wrong_groups, wrong_numbers
from fuzz_text_loop import LoopedText, Scene, log_probs, read_from

# Of the nll of a token, relative to max(1, nll): the model runs in float32, other rows beside it.
TOLERANCE = 2e-5


def scored_of(text: LoopedText) -> Scored:
    """The scored tokens of a text with their weights."""
    return Scored([text.nll[i] for i in text.scored], [text.weights[i] for i in text.scored])


def compare_logs(name: str, value: float, log_of_expected: float, allowed: float) -> list[str]:
    """What is wrong with a number that is the exp of another; `allowed` is of its logarithm."""
    if not math.isfinite(log_of_expected) or log_of_expected > 700:
        near = is_near(value, exp_or_inf(log_of_expected), 0.0) or value > math.exp(700)
    else:
        near = value > 0 and abs(math.log(value) - log_of_expected) <= allowed
    return [] if near else [f"{name} is {value}, not exp({log_of_expected})"]


def wrong_counts(result: dict, texts: list[LoopedText], prefix: str = "") -> list[str]:
    """What is wrong with the numbers by byte and by word."""
    total = math.fsum(nll for text in texts for nll in text.nll if nll is not None)
    tokens = sum(len(text.scored) for text in texts)
    wrong = []
    for unit, name in (("byte", "num_bytes"), ("word", "num_words")):
        counts = [getattr(text, name) for text in texts]
        if None in counts or name not in result:
            continue
        count = sum(counts)
        if result[name] != count:
            wrong.append(f"{name} is {result[name]}, not {count}")
            continue
        each = total / count if count else math.nan
        allowed = TOLERANCE * (total + tokens) / count if count else 0.0
        key = f"{prefix}{unit}_perplexity"
        wrong += compare_logs(key, result[key], each, allowed) if key in result else []
        key = f"{prefix}bits_per_{unit}"
        if key in result and not is_near(result[key], each / math.log(2), allowed / math.log(2)):
            wrong.append(f"{key} is {result[key]}, not {each / math.log(2)}")
    return wrong


def wrong_of_compute(
    scene: Scene, groups: list[str] | None, result: dict, texts: list[LoopedText]
) -> list[str]:
    """What in the result of `compute` is not that of the loop."""
    scored = [scored_of(text) for text in texts]
    wrong = wrong_numbers(result, scored, TOLERANCE) + wrong_counts(result, texts)
    means = [mean_nll([each]) for each in scored]
    if len(result["perplexities"]) != len(means):
        return [*wrong, f"{len(result['perplexities'])} perplexities of {len(means)} texts"]
    for i, (value, mean) in enumerate(zip(result["perplexities"], means, strict=True)):
        wrong += compare_logs(f"perplexities[{i}]", value, mean, TOLERANCE * (1 + mean))
    perplexities = [exp_or_inf(mean) for mean, each in zip(means, scored, strict=True) if each.nll]
    expected = sum(perplexities) / len(perplexities) if perplexities else math.nan
    largest = max((mean for mean in means if not math.isnan(mean)), default=0.0)
    if not is_near(result["mean_perplexity"], expected, 2 * TOLERANCE * (1 + largest) * expected):
        wrong.append(f"mean_perplexity is {result['mean_perplexity']}, not {expected}")
    if "max_length" in scene.options:
        number = sum(text.truncated for text in texts)
        if result["num_truncated"] != number:
            wrong.append(f"num_truncated is {result['num_truncated']}, not {number}")
    if groups is not None:
        wrong += wrong_groups(result, scored, groups, TOLERANCE)
    if scene.options.get("positions"):
        wrong += wrong_positions(scene, result["positions"], texts)
    return wrong


def wrong_positions(scene: Scene, found: dict, texts: list[LoopedText]) -> list[str]:
    """What in the buckets by position is not that of the loop."""
    wrong, seen = [], 0
    for label, bucket in found.items():
        first, _, last = label.partition("-")
        here = range(int(first), int(last or first) + 1)
        parts = []
        for text in texts:
            places = [i for i in text.scored if text.contexts[i] in here]
            nll, weights = ([values[i] for i in places] for values in (text.nll, text.weights))
            parts.append(Scored(nll, weights))
            seen += len(places)
        wrong += [f"in bucket {label} {what}" for what in wrong_numbers(bucket, parts, TOLERANCE)]
    if seen != sum(len(text.scored) for text in texts):
        wrong.append(f"the buckets {list(found)} leave tokens out")
    edges = scene.options["positions"]
    if edges is not True and len(found) != len(edges):
        wrong.append(f"{list(found)} are not the buckets of {edges}")
    return wrong


def wrong_of_score(scores: list, texts: list[LoopedText]) -> list[str]:
    """What in the result of `score` is not that of the loop."""
    wrong = [] if len(scores) == len(texts) else [f"{len(scores)} scores of {len(texts)} texts"]
    for number, (score, text) in enumerate(zip(scores, texts, strict=False)):
        expected = [math.nan if nll is None else nll for nll in text.nll[text.num_prefix :]]
        if len(score.nll) != len(expected):
            wrong.append(f"scores[{number}] has {len(score.nll)} tokens, not {len(expected)}")
            continue
        for i, (value, nll) in enumerate(zip(score.nll, expected, strict=True)):
            if not is_near(value, nll, TOLERANCE * max(1.0, nll)):
                wrong.append(f"scores[{number}].nll[{i}] is {value}, not {nll}")
        if score.offsets and not text.truncated and score.offsets[-1][1] != len(score.text):
            wrong.append(f"the offsets of scores[{number}] do not cover the text")
    return wrong[:3]


def divergences(own: Scene, base: Scene, texts: list[LoopedText]) -> list[tuple[float, float]]:
    """Of each scored token the KL divergence of the base's prediction from the model's, in nats,
    and its weight."""
    found = []
    for text in texts:
        for start, first, stop, *_ in text.windows:
            rows, base_rows = (
                log_probs(scene, read_from(scene, text.ids, start, stop)) for scene in (own, base)
            )
            for i in range(first, stop):
                q, p = rows[i - 1 - start], base_rows[i - 1 - start]
                here = p > -math.inf
                kl = float((np.exp(p[here]) * (p[here] - q[here])).sum())
                found.append((kl, text.weights[i]))
    return [pair for pair in found if pair[1] > 0]


def wrong_of_compare(own: Scene, base: Scene, result: dict, sides: list) -> list[str]:
    """What in the result of `compare` is not that of the loop; `sides` are the texts of both."""
    wrong = []
    for prefix, texts in zip(("", "base_"), sides, strict=True):
        mean = mean_nll([scored_of(text) for text in texts])
        allowed = TOLERANCE * (1 + mean)
        wrong += compare_logs(f"{prefix}perplexity", result[f"{prefix}perplexity"], mean, allowed)
        counted = {name: value for name, value in result.items() if name != "num_words"}
        # The base may have other bytes, where it does not score the first token.
        counted |= {"num_bytes": sum(text.num_bytes or 0 for text in texts)} if prefix else {}
        wrong += wrong_counts(counted, texts, prefix)
    if "mean_kl" not in result:
        return wrong
    pairs = divergences(own, base, sides[0])
    expected = sum(kl * w for kl, w in pairs) / sum(w for _, w in pairs) if pairs else math.nan
    allowed = TOLERANCE * (1 + abs(expected)) if math.isfinite(expected) else 0.0
    if not is_near(result["mean_kl"], expected, allowed):
        wrong.append(f"mean_kl is {result['mean_kl']}, not {expected}")
    return wrong
