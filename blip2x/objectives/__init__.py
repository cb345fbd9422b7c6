"""A model and its losses as one layer, the unit that data parallelism wraps: batch -> {"loss": ..., its parts}."""
