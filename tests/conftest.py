"""Fixtures that tests of several rooms use."""

import hypothesis
import pytest
from support import ROOT  # which sets the environment, before transformers is imported

from ppleval import Perplexity

# No wall-clock limit: machines are slow at times.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


@pytest.fixture
def ppl():
    return Perplexity()


@pytest.fixture(scope="module")
def tokenizer():
    """That of the bundled model."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(ROOT / "tiny_model")


@pytest.fixture(scope="module")
def models():
    """Name -> (model, tokenizer), tiny and random."""
    from text_oracles import make_models  # which imports from here

    return make_models()
