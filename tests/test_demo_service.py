"""Who waits for whom when models load and texts are scored; no page is needed for that."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
from demo_models import ABSENT, LABEL, load_absent_by, settings_with

from demo import service
from demo.settings import Queue


@pytest.fixture(scope="module")
def settings():
    return settings_with(ABSENT)


def test_a_model_is_loaded_once(settings, monkeypatch):
    metrics = service.Metrics(settings)
    loaded = []
    load_scorer = metrics._load_scorer
    monkeypatch.setattr(metrics, "_load_scorer", lambda m: loaded.append(m) or load_scorer(m))
    for _ in range(2):
        metrics.score("The list.", LABEL, lambda done, total: None)
    assert [model.label for model in loaded] == [LABEL]


@pytest.mark.parametrize("error", [ValueError, OSError, MemoryError])
def test_a_model_that_cannot_be_loaded_is_tried_every_five_minutes(settings, monkeypatch, error):
    clock, tried = SimpleNamespace(now=1000.0), []
    clock.monotonic = lambda: clock.now

    def of_absent():
        tried.append(clock.now)
        raise error("not there")

    load_absent_by(of_absent, monkeypatch)
    monkeypatch.setattr(service, "time", clock)
    metrics = service.Metrics(settings)
    for now in (1000.0, 1001.0, 1299.0, 1301.0, 1302.0):
        clock.now = now
        with pytest.raises(service.Visible, match="Absent cannot be loaded at the moment"):
            metrics.score("text", "Absent", lambda done, total: None)
        metrics.score("text", LABEL, lambda done, total: None)
    assert tried == [1000.0, 1301.0]


def test_no_more_texts_are_scored_at_once_than_configured(settings, monkeypatch):
    metrics = service.Metrics(replace(settings, queue=Queue(size=40, concurrency=2)))
    at_once, most, lock = 0, 0, threading.Lock()
    both = threading.Barrier(2)  # two at once there must be

    def slow_score(texts, **options):
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        both.wait(20)
        with lock:
            at_once -= 1
        return scorer_score(texts, **options)

    scorer = metrics.scorer(LABEL)
    scorer_score = scorer.score
    monkeypatch.setattr(scorer, "score", slow_score)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: metrics.score("text", LABEL, lambda *_: None), range(8)))
    assert most == 2
