"""BLIP-2 from Python: ``blip2x.load`` and the models that it gives, on the path that the tasks take, too."""

from blip2x.startup import prepare_process_once

prepare_process_once()  # before the imports below bring paddle

from blip2x.api.load import load  # noqa: E402

__all__ = ["load"]
