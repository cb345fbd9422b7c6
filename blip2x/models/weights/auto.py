"""What weights say of a model whose config leaves that to them; nothing here imports paddle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from blip2x.config.auto import Settings
from blip2x.models.weights.describe import describe, guessed_heads
from blip2x.models.weights.known import locate
from blip2x.models.weights.source import open_source
from blip2x.registry import WEIGHT_READERS


@WEIGHT_READERS.register("auto")
def read(given: Settings, root: Path, *, offline: bool) -> tuple[Settings, Callable[[Settings, str], int]]:
    """What the sources that `given` names say of the model, and how to guess a number of heads.

    Args:
        given: values of the config's ``model`` group by dotted key; its "weights", and those of parts that these do not hold.
        root: the config's paths.weights.
        offline: nothing is fetched.

    Raises:
        UserError: weights that cannot be had or read.
    """
    settings = describe(open_source(locate(given["weights"], root, offline=offline, key="model.weights")))
    for part in ("vision", "language"):
        name = given.get(f"{part}.weights")
        if name is None or f"{part}.mlp_width" in settings:
            continue
        source = open_source(locate(name, root, offline=offline, key=f"model.{part}.weights"))
        settings |= {key: value for key, value in describe(source).items() if key.startswith(f"{part}.")}
    return settings, guessed_heads
