"""What is shown of names, addresses and messages that others wrote: visible, short, no secrets.

A file, a column, a group or a model may be named by whoever made it, with what a terminal obeys.
Results keep such names as they are; tables, pictures, signatures, warnings and errors show them.
"""

import difflib
import re
import unicodedata
from collections.abc import Collection, Iterable
from itertools import islice

MOST_OF_A_NAME = 200  # characters
MOST_OF_A_MESSAGE = 2000
NAMES_LISTED = 8
NAMES_COMPARED = 1000  # by how like they are to another, which takes a while

# The joiners are parts of scripts and emoji; spaces of every width are seen as such.
JOINERS = "\u200c\u200d"
# What stands between the scheme of a URI and its host, "user:password@", also with a slash in the
# password, which should be %2F. pathlib leaves one slash of two; one letter is a drive of Windows,
# and a number is a port. Counts are bounded, or a hostile name would take a time of its square.
USER = re.compile(
    r"(?<=[A-Za-z0-9+.-]{2})(:/+)(?:[^\s/?#]*|[^\s/?#:@]{1,500}:(?!\d+[/?#])[^\s@]{0,500})@"
)
SECRET = r"token|signature|secret|passw|credential|key|sig|auth"
QUERY = re.compile(rf"([?&;#][\w.-]{{0,50}}(?:{SECRET})[\w.-]{{0,50}}=)[^&#\s'\"]+", re.IGNORECASE)


def shown(name: object, most: int = MOST_OF_A_NAME) -> str:
    """A name or an address as people may see it, in at most `most` characters.

    What is invisible, ends a line or turns the direction of text is an escape, as in Python's
    strings; secrets of an address are left out; of a long one the middle is a count.
    """
    whole = str(name)
    ends = 8 * most  # enough to see where a secret ends
    num_skipped = max(0, len(whole) - 2 * ends)
    text = whole[:ends] + whole[ends + num_skipped :]
    text = visible(without_secrets(text))
    if len(text) <= most and num_skipped == 0:
        return text
    count = num_skipped + len(text)  # as long as the number that is left out, or longer
    half = (most - len(f"...[{count:,} more]...")) // 2
    return f"{text[:half]}...[{count - 2 * half:,} more]...{text[-half:]}"


def shown_message(message: object) -> str:
    """A message in one line, as `shown`."""
    return shown(" ".join(str(message).split()), MOST_OF_A_MESSAGE)


def visible(text: str) -> str:
    """The text with escapes for control and format characters, line ends and lone surrogates."""
    if text.isprintable():
        return text
    return "".join(
        character if _is_visible(character) else character.encode("unicode_escape").decode()
        for character in text
    )


def _is_visible(character: str) -> bool:
    is_space = unicodedata.category(character) == "Zs"
    return character.isprintable() or is_space or character in JOINERS


def without_secrets(text: str) -> str:
    """The text; in addresses *** takes the place of users, passwords, tokens and signatures."""
    if ":/" not in text:
        return text
    return QUERY.sub(r"\1***", USER.sub(r"\1***@", text))


def listed(names: Collection[object], most: int = NAMES_LISTED, near: str | None = None) -> str:
    """Some of the names and how many others there are; "none" without any.

    Args:
        near: of too many names, show those that are most like this one.
    """
    some: Iterable[object] = islice(names, most)
    if near is not None and len(names) > most:
        first = [str(name) for name in islice(names, NAMES_COMPARED)]
        like = difflib.get_close_matches(
            near[:MOST_OF_A_NAME], [name for name in first if len(name) <= MOST_OF_A_NAME], most
        )
        some = like or first[:most]
    found = [shown(name) for name in some]
    others = len(names) - len(found)
    found += [f"and {others:,} more"] if others > 0 else []
    return ", ".join(found) or "none"
