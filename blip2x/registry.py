"""Kind + name -> builder, found by module name.

A registry belongs to one package; the builder of kind ``caption`` lives in ``<package>.caption``. Nothing is imported until
a kind is asked for, so that a YAML typo is answered without importing paddle.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, TypeVar

from blip2x.errors import UserError

T = TypeVar("T", bound=Callable[..., Any])


class Registry:
    """Builders of one sort (tasks, data sources, ...), one module of `package` per kind."""

    def __init__(self, sort: str, package: str):
        self.sort = sort
        self.package = package
        self._builders: dict[str, Callable[..., Any]] = {}

    def register(self, kind: str) -> Callable[[T], T]:
        """Decorate the builder (class or function) of `kind`; its module must be ``<package>.<kind>``."""

        def add(builder: T) -> T:
            if builder.__module__ != f"{self.package}.{kind}":
                raise ValueError(f"{self.sort} {kind!r} must live in {self.package}.{kind}, not in {builder.__module__}")
            self._builders[kind] = builder
            return builder

        return add

    def known(self) -> list[str]:
        """All kinds, by listing the package's files (nothing of them is imported)."""
        package = importlib.import_module(self.package)
        return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.ispkg and not m.name.startswith("_"))

    def check(self, kind: str) -> None:
        """Raise `UserError` with the known kinds if `kind` is none of them."""
        if kind not in self.known():
            raise UserError(f"unknown {self.sort} {kind!r}; known: {', '.join(self.known())}")

    def get(self, kind: str) -> Callable[..., Any]:
        """The builder of `kind`, importing its module on first use."""
        if kind not in self._builders:
            self.check(kind)
            importlib.import_module(f"{self.package}.{kind}")
        return self._builders[kind]


TASKS = Registry("task", "blip2x.tasks")
DATASETS = Registry("dataset", "blip2x.data.sources")
ANNOTATION_FORMATS = Registry("format of annotation files", "blip2x.data.formats")
VISION_ENCODERS = Registry("vision encoder", "blip2x.models.vision")
LANGUAGE_MODELS = Registry("language model", "blip2x.models.language")
WEIGHT_READERS = Registry("reader of weights", "blip2x.models.weights")
STRATEGIES = Registry("parallelism", "blip2x.parallel.strategies")
LOGGERS = Registry("logger", "blip2x.engine.loggers")
