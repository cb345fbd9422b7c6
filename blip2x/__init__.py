"""BLIP-2 on PaddlePaddle: training, evaluation and inference as a Hydra experiment framework."""

__version__ = "0.1.0"
