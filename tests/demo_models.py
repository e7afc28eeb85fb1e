"""The models that the demo offers in its tests: the bundled one, and one that is not there."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from support import ROOT

import demo.models
from demo.service import Metrics
from demo.settings import Model, Settings, read_settings
from ppleval import Perplexity

LABEL = "Bundled model"
ABSENT = Model("Absent", "nobody/nothing", None, None, None, "nowhere", None)


def settings_with(*more: Model) -> Settings:
    """Those of app_config.yaml, but with the bundled model and these.

    All visitors of a test have one address.
    """
    settings = read_settings(ROOT / "app_config.yaml")
    queue = replace(settings.queue, per_address=1000)
    return replace(settings, models=[settings.models[0], *more], queue=queue)


def loaded(settings: Settings) -> Metrics:
    """Each model has been tried once, so that a test may load others meanwhile."""
    metrics = Metrics(settings)
    for tried in metrics.models._tried.values():
        assert tried.wait(60)
    return metrics


def load_absent_by(of_absent: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """This function loads the model ABSENT instead of the metric."""

    def patched():
        metric = Perplexity()
        text_scorer = metric.text_scorer
        metric.text_scorer = lambda **options: (
            of_absent() if options["model_id"] == ABSENT.id else text_scorer(**options)
        )
        return metric

    monkeypatch.setattr(demo.models, "Perplexity", patched)
