"""Models are loaded in the background, and nobody waits long for one that is not there."""

import threading
import time
from dataclasses import replace

import pytest
from demo_models import ABSENT, LABEL, load_absent_by, settings_with
from demo_server import wait_for

from demo import models
from demo.settings import Model
from ppleval import Perplexity

HALF = Model("Half", "tiny_model", None, "bfloat16", None, "rounded", None)


@pytest.fixture
def listed():
    """Starts to load the models of settings, and ends that after the test."""
    started = []

    def start(settings):
        started.append(models.Models(settings))
        return started[-1]

    yield start
    for one in started:
        one.close()
        one._thread.join(20)


def test_a_model_is_loaded_once_and_before_it_is_asked_for(listed, monkeypatch):
    loaded, load = [], models._load
    monkeypatch.setattr(models, "_load", lambda model: loaded.append(model.label) or load(model))
    found = listed(settings_with(HALF))
    assert found._tried[HALF.label].wait(20)
    assert found.absent() == []
    assert found.scorer(LABEL) is found.scorer(LABEL)
    assert str(found.scorer("Half").model.model.dtype) == "torch.bfloat16"
    assert loaded == [LABEL, "Half"]


def test_what_may_wait_for_the_network_comes_last(listed, monkeypatch):
    loaded = []
    monkeypatch.setattr(models, "_load", lambda model: loaded.append(model.label))
    settings = settings_with(HALF)
    settings = replace(settings, models=[ABSENT, *settings.models], default_model="Half")
    assert listed(settings)._tried["Absent"].wait(20)
    assert loaded == ["Half", LABEL, "Absent"]


@pytest.mark.parametrize("error", [ValueError, OSError, MemoryError])
def test_a_model_that_cannot_be_loaded_is_tried_again_later(listed, monkeypatch, error):
    tried, asked_twice = [], threading.Event()

    def of_absent():
        tried.append(time.monotonic())
        if len(tried) == 1:
            raise error("not there")
        assert asked_twice.wait(20)
        return "a scorer"

    load_absent_by(of_absent, monkeypatch)
    monkeypatch.setattr(models, "RETRY_S", 0.2)
    found = listed(settings_with(ABSENT))
    assert found._tried["Absent"].wait(20)
    assert found.absent() == ["Absent"]
    for times in (1, 2):  # the second time while it is being tried again
        wait_for(lambda times=times: len(tried) == times)
        with pytest.raises(models.Visible, match="Absent cannot be loaded at the moment"):
            found.scorer("Absent")
        found.scorer(LABEL)
    asked_twice.set()
    wait_for(lambda: found.absent() == [])
    assert found.scorer("Absent") == "a scorer"
    assert len(tried) == 2
    assert tried[1] - tried[0] >= 0.2


def test_one_visitor_waits_for_a_model_and_others_are_told_at_once(listed, monkeypatch):
    over = threading.Event()
    load_absent_by(lambda: over.wait(20) and "a scorer", monkeypatch)
    monkeypatch.setattr(models, "PATIENCE_S", 20)  # of the first
    found, first = listed(settings_with(ABSENT)), []
    assert found._tried[LABEL].wait(20)
    waiting = threading.Thread(target=lambda: first.append(found.scorer("Absent")))
    waiting.start()
    wait_for(lambda: found._places["Absent"].locked())
    with pytest.raises(models.Visible, match=r"Absent is being loaded\. Try again in a minute"):
        found.scorer("Absent")
    assert found.absent() == ["Absent"]
    assert found.scorer(LABEL) is not None
    over.set()
    waiting.join(20)
    assert first == ["a scorer"]


def test_patience_ends(listed, monkeypatch):
    over = threading.Event()
    load_absent_by(lambda: over.wait(20) and "a scorer", monkeypatch)
    monkeypatch.setattr(models, "PATIENCE_S", 0.01)
    try:
        with pytest.raises(models.Visible, match="Absent is being loaded"):
            listed(settings_with(ABSENT)).scorer("Absent")
    finally:
        over.set()


def test_only_listed_models(listed):
    found = listed(settings_with())
    for label in ("tiny_model", "../tiny_model", None, ["x"]):
        with pytest.raises(models.Visible, match="not on the list"):
            found.scorer(label)


def test_no_model_is_loaded_after_the_end(monkeypatch):
    started, over = threading.Event(), threading.Event()
    monkeypatch.setattr(
        models, "Perplexity", lambda: started.set() or (over.wait(20) and Perplexity())
    )
    found = models.Models(settings_with(ABSENT))
    assert started.wait(20)
    found.close()
    started.clear()
    over.set()
    assert found._tried[LABEL].wait(20)
    assert not found._tried["Absent"].wait(0.2)
    assert not started.is_set()
