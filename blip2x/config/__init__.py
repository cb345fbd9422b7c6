"""What a run is made of: dataclasses that Hydra fills. Nothing here imports paddle."""

from blip2x.config.load import load_config
from blip2x.config.run import RunConfig

__all__ = ["RunConfig", "load_config"]
