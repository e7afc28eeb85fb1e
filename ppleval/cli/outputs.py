"""The places that the command line writes to, checked before the work: nothing that is read is
written over, nor, unasked, anything else; and no result is computed that cannot be written."""

import argparse
import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ppleval.show import plots
from ppleval.shown import shown


def check_results(args: argparse.Namespace, sources: list[str], to_directory: bool = False) -> None:
    """Check the places of --per-text and --plot; nothing is opened or made.

    Args:
        sources: the dataset or the files to read; "-" is the standard input.
        to_directory: --per-text is one, which checks itself.

    Raises:
        ValueError: a place that is read, or named twice, under whatever name; one that exists, if
            it may be neither continued nor overwritten; one that cannot be written; the standard
            output; a picture of an unknown kind.
        ModuleNotFoundError: a picture without matplotlib.
    """
    _check_apart({"--per-text": args.per_text, "--plot": args.plot}, _inputs(args, sources))
    if args.plot is not None:
        plots.check_path(args.plot)
        _check_file("--plot", args.plot, args.overwrite, "--overwrite")
    if args.per_text is not None and not to_directory:
        may_exist = args.resume or args.overwrite
        _check_file(
            "--per-text", args.per_text, may_exist, "--overwrite, or --resume to continue it"
        )


def check_base(args: argparse.Namespace, sources: list[str]) -> None:
    """Check the place of --to; nothing is opened or made.

    Raises:
        ValueError: a place that is read, or that cannot be written; the standard output.
    """
    _check_apart({"--to": args.to}, _inputs(args, sources))
    _check_directory("--to", args.to)


def _check_apart(outputs: dict[str, str | Path | None], inputs: dict[str, str]) -> None:
    """Raises ValueError if writing to a place would change another, or if none is named.

    Args:
        outputs: option -> the place that it names.
        inputs: the place of what is read -> what errors call it.
    """
    taken = dict(inputs)
    for option, name in outputs.items():
        if name is None:
            continue
        if str(name) == "-":
            raise ValueError(
                f"{option} - would write to the standard output, which is the result's. Name a "
                "file, or ./- for one of this name."
            )
        place = _place(str(name))
        if os.path.exists(place) and not (os.path.isfile(place) or os.path.isdir(place)):
            continue  # a device or a pipe, which keeps nothing
        for other, what in taken.items():
            conflict = _conflict(place, other)
            if conflict is not None:
                raise ValueError(f"{option} {shown(name)} {conflict} {what}. Name another place.")
        taken[place] = f"{shown(name)}, the place of {option}"


def _inputs(args: argparse.Namespace, sources: list[str]) -> dict[str, str]:
    """The place of each file or directory that is read -> what errors call it."""
    names = sources if args.dataset is None else [args.dataset.partition(":")[0]]
    given = (vars(args).get(option) for option in ("model", "base", "chat_template"))
    places = {}
    for name in map(str, [*names, *filter(None, given)]):
        place, title = ("/dev/stdin", "the standard input") if name == "-" else (name, shown(name))
        place = _place(place)
        # A name on the Hub is no path, though an output may have the same.
        if "://" in name or os.path.exists(place):
            places[place] = f"{title}, which is to be read"
    return places


def _place(name: str) -> str:
    """The absolute path behind a name, without links; a URI has one that nothing else has."""
    scheme, is_uri, _ = name.partition("://")
    if scheme == "file":
        name = unquote(urlsplit(name).path)
    elif is_uri:
        name = os.path.join(os.sep, name)
    return os.path.realpath(name)


def _conflict(output: str, place: str) -> str | None:
    """How writing one would change the other, as a verb; None if it would not."""
    if _same(output, place):
        return "would overwrite"
    if _lies_in(output, place):
        return "lies in"
    if _lies_in(place, output):
        return "contains"
    if os.path.isfile(output) and any(  # links into a directory, such as those of the Hub's cache
        _same(output, str(entry)) or (entry.is_symlink() and _lies_in(output, str(entry)))
        for entry in Path(place).rglob("*")
    ):
        return "would overwrite a file of"
    return None


def _same(one: str, other: str) -> bool:
    """Whether two names are of one file or directory, be they hard links or differ in case."""
    if one == other:
        return True
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


def _lies_in(place: str, directory: str) -> bool:
    return any(_same(str(parent), directory) for parent in Path(place).parents)


def _check_file(option: str, name: str | Path, may_exist: bool, allowing: str) -> None:
    """Raises ValueError unless a file can be written; `allowing` are options by which it may be
    there."""
    place = os.path.realpath(name)
    parent, name = os.path.dirname(place), shown(name)
    if os.path.isdir(place):
        raise ValueError(f"{option} {name} is a directory; name a file.")
    if not os.path.isdir(parent):
        raise ValueError(
            f"{option} {name} cannot be written: there is no directory {shown(parent)}."
        )
    if os.path.isfile(place) and os.path.getsize(place) > 0 and not may_exist:
        raise ValueError(f"{option} {name} exists. Name a new file, or pass {allowing}.")
    _check_permission(option, name, place if os.path.exists(place) else parent)


def _check_directory(option: str, name: Path) -> None:
    """Raises ValueError unless a directory can be made, or written to."""
    place = os.path.realpath(name)
    nearest = next(path for path in (place, *map(str, Path(place).parents)) if os.path.exists(path))
    if not os.path.isdir(nearest):
        raise ValueError(
            f"{option} {shown(name)} cannot be written: there is no directory {shown(nearest)}."
        )
    _check_permission(option, shown(name), nearest)


def _check_permission(option: str, name: str, place: str) -> None:
    if not os.access(place, os.W_OK):
        raise ValueError(
            f"{option} {name} cannot be written: no permission to write to {shown(place)}."
        )
