"""The metric's warnings name the line of the user's call."""

import numpy as np
import pytest
from support import ROOT

from ppleval import Perplexity

NAN = {"predictions": np.full((1, 1, 2), np.nan), "references": [[0]]}
UNSCORED = {"predictions": np.zeros((1, 1, 2)), "references": [[-100]]}
TEXTS = {"predictions": ["Return the number of items.", ""], "model_id": str(ROOT / "tiny_model")}
CALLS = {
    "add_batch": lambda ppl: ppl.add_batch(**NAN),
    "add": lambda ppl: ppl.add(prediction=NAN["predictions"][0], reference=[0]),
    "call": lambda ppl: ppl(**NAN),
    "compute": lambda ppl: ppl.compute(**NAN),
    "compute with sync": lambda ppl: ppl.compute(**NAN, sync=True),
    "nothing scored": lambda ppl: ppl.compute(**UNSCORED),
    "texts": lambda ppl: ppl.compute(**TEXTS),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_warning_names_the_line_of_the_call(name):
    with pytest.warns(UserWarning, match="holds NaN|No token|have no token") as caught:
        CALLS[name](Perplexity())
    (warning,) = caught
    place = (warning.filename, warning.lineno)
    assert place == (__file__, CALLS[name].__code__.co_firstlineno)
