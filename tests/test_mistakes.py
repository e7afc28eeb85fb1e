"""What people do wrong, and what they are told: one table of calls and words of their errors.

Read each error aloud: it names the argument, what was expected, what came, and what to do.
"""

import pytest
from command_line import run

from ppleval import Perplexity

TEXTS = ["To be, or not to be.", "That is the question."]


def command(*arguments, stdin="") -> None:
    """The command, whose last line is raised as an error if it fails."""
    done = run(*arguments, stdin=stdin)
    if done.returncode:
        raise ChildProcessError(done.stderr.strip().splitlines()[-1])


# What the mistake is -> (a call that makes it, words that its error has).
LOADING = {}
TEXT_INPUTS = {}
LOGITS = {
    "no logits at all": (lambda: Perplexity().compute(), ["Nothing", "add_batch"]),
}
TRAINER = {}
COMMAND = {}
MISTAKES = LOADING | TEXT_INPUTS | LOGITS | TRAINER | COMMAND


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_error_says_what_to_do(mistake):
    call, words = MISTAKES[mistake]
    with pytest.raises(Exception) as error:  # noqa: PT011
        call()
    said = str(error.value)
    assert [word for word in words if word not in said] == [], said
