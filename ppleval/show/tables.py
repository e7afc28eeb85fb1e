"""Results as tables for people, which the command prints."""

import math

from ppleval.shown import MOST_OF_A_MESSAGE, shown

MOST_OF_A_LABEL = 100  # characters of a group's name, which widens all rows


def as_table(result: dict, model: str) -> str:
    """The result for people."""
    low, high = result["perplexity_ci_low"], result["perplexity_ci_high"]
    interval = f"95% interval {low:.2f} to {high:.2f}, of {result['num_sequences']:,} texts"
    if math.isnan(low):
        interval = "no 95% interval: too few texts, or too unequal ones"
    rows = [
        ("perplexity", f"{result['perplexity']:.2f}", interval),
        ("mean perplexity", f"{result['mean_perplexity']:.2f}", "mean of one for each text"),
        ("bits per token", f"{result['bits_per_token']:.3f}", ""),
        ("bits per byte", f"{result['bits_per_byte']:.3f}", ""),
        ("word perplexity", f"{result['word_perplexity']:.2f}", ""),
        ("texts", f"{result['num_sequences']:,}", ""),
        ("tokens", f"{result['num_tokens']:,}", ""),
        ("bytes", f"{result['num_bytes']:,}", ""),
    ]
    if result.get("num_truncated", 0) > 0:
        rows.append(("texts cut", f"{result['num_truncated']:,}", "by --max-length"))
    rows += _dropped(result)
    if "groups" in result:
        rows += _parts("by group", result["groups"], "perplexity", ".2f")
        macro = f"{result['macro_perplexity']:.2f}"
        rows.append(("macro perplexity", macro, "of the groups' mean nll, unweighted"))
    if "positions" in result:
        rows += _positions(result["positions"], "perplexity", ".2f")
    return _table(shown(model), rows, result["signature"])


def comparison_table(result: dict, model: str, base: str) -> str:
    """The result of a comparison for people."""
    rows = [
        ("perplexity", f"{result['perplexity']:.3f}", f"base {result['base_perplexity']:.3f}"),
        (
            "bits per byte",
            f"{result['bits_per_byte']:.4f}",
            f"base {result['base_bits_per_byte']:.4f}",
        ),
        _with_interval("difference", result, "bits_per_byte_difference", "+.4f"),
    ]
    if "perplexity_ratio" in result:
        kl = [f"{label} {result[f'kl_{label}']:.3g}" for label in ("median", "p99", "max")]
        rows += [
            _with_interval("perplexity ratio", result, "perplexity_ratio", ".4f"),
            _with_interval("KL divergence", result, "mean_kl", ".4g"),
            ("", "", f"of single tokens: {', '.join(kl)}"),
            _with_interval("same top token", result, "same_top", ".2%"),
            (
                "token's chance",
                f"{result['mean_delta_p']:+.2%}",
                f"mean change; RMS {result['rms_delta_p']:.2%}",
            ),
        ]
        if result["num_infinite_kl"] > 0:
            rows.append(
                (
                    "infinite KL",
                    f"{result['num_infinite_kl']:,}",
                    "tokens at which the model excludes what the base allows",
                )
            )
    else:
        rows.append(("", "", "different tokens: only bits per byte compare"))
    rows += [
        ("texts", f"{result['num_sequences']:,}", ""),
        ("tokens", f"{result['num_tokens']:,}", ""),
        *_dropped(result),
    ]
    name = "perplexity_ratio" if "perplexity_ratio" in result else "bits_per_byte_difference"
    form = ".4f" if name == "perplexity_ratio" else "+.4f"
    if "groups" in result:
        rows += _parts("by group", result["groups"], name, form)
        macro, base_macro = (result[f"{side}macro_perplexity"] for side in ("", "base_"))
        rows.append(("macro perplexity", f"{macro:.3f}", f"base {base_macro:.3f}"))
    if "positions" in result:
        rows += _positions(result["positions"], name, form)
    return _table(f"{shown(model)}, compared with {shown(base)}", rows, result["signature"])


def _dropped(result: dict) -> list[tuple[str, str, str]]:
    """A line for the tokens that a preset dropped, if any."""
    dropped = result.get("num_dropped_tokens", 0)
    return [("tokens dropped", f"{dropped:,}", "behind the last whole chunk")] if dropped else []


def _parts(title: str, results: dict, name: str, form: str) -> list[tuple[str, str, str]]:
    """A line for each part of the texts, below one that says what it shows."""
    rows = [(title, "", name.replace("_", " "))]
    for label, result in results.items():
        _, value, interval = _with_interval(label, result, name, form)
        counts = f"tokens {result['num_tokens']:,}"
        if "num_sequences" in result:
            counts += f", texts {result['num_sequences']:,}"
        rows.append((f"  {shown(label, MOST_OF_A_LABEL)}", value, f"{interval}; {counts}"))
    return rows


def _positions(results: dict, name: str, form: str) -> list[tuple[str, str, str]]:
    """A line for each bucket with tokens; short texts leave most of them empty."""
    found = {label: result for label, result in results.items() if result["num_tokens"] > 0}
    return _parts("tokens before", found, name, form)


def _with_interval(label: str, result: dict, name: str, form: str) -> tuple[str, str, str]:
    low, high = result[f"{name}_ci_low"], result[f"{name}_ci_high"]
    interval = f"95% interval {low:{form}} to {high:{form}}"
    if math.isnan(low):
        interval = "no 95% interval"
    return label, f"{result[name]:{form}}", interval


def _table(title: str, rows: list[tuple[str, str, str]], signature: str) -> str:
    width = max(16, *(len(name) for name, _, _ in rows))
    lines = [f"  {name:<{width}}{value:>12}   {note}".rstrip() for name, value, note in rows]
    return "\n".join([title, *lines, f"  {shown(signature, MOST_OF_A_MESSAGE)}"])
