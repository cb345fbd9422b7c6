"""How a dataclass becomes a Hydra schema: ``@schema("task", "caption")`` makes ``/schema/task/caption``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from hydra.core.config_store import ConfigStore

C = TypeVar("C", bound=type)


def schema(group: str, name: str) -> Callable[[C], C]:
    """Register a config dataclass as ``/schema/<group>/<name>`` for the defaults lists of ``conf/<group>/*.yaml``."""

    def store(cls: C) -> C:
        ConfigStore.instance().store(group=f"schema/{group}", name=name, node=cls)
        return cls

    return store
