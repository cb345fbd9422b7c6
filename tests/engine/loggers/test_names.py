"""Nested values under one name each."""

from __future__ import annotations

from blip2x.engine.loggers._names import flat


def test_flat():
    assert flat({"a": {"b": {"c": 1}}, "d": 2}, "r/") == {"r/a/b/c": 1, "r/d": 2}
