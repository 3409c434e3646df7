"""Transformers is quiet while we use it, and as loud as before afterwards."""

from __future__ import annotations

import logging

import pytest
from transformers.utils import logging as transformers_logging

from compress.models.classes import quiet_transformers


def test_quiet_transformers_holds_warnings_back_and_leaves_all_as_it_was(monkeypatch, caplog):
    library, logger = logging.getLogger("transformers"), transformers_logging.get_logger("transformers.some")
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    monkeypatch.setattr(library, "handlers", [handler])
    monkeypatch.setattr(library, "propagate", True)  # as in CI
    logger.warning("before")
    cached = dict(logger._cache)
    with quiet_transformers():
        logger.warning("within")
        with quiet_transformers():
            logger.warning("within two")
        logger.warning("within again")
        logger.error("an error")
    logger.warning("after")
    assert heard == ["before", "an error", "after"]
    assert [record.getMessage() for record in caplog.records] == ["before", "after"]
    assert cached.items() <= logger._cache.items()  # setting a logger's level would have emptied it


def test_quiet_transformers_leaves_all_as_it_was_after_an_error():
    library = logging.getLogger("transformers")
    levels, bars = [each.level for each in library.handlers], transformers_logging.is_progress_bar_enabled()
    with pytest.raises(KeyError), quiet_transformers():
        raise KeyError
    assert [each.level for each in library.handlers] == levels
    assert transformers_logging.is_progress_bar_enabled() == bars
