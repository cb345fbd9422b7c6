"""Scenes of coloured handwritten digits: the material of the `digits` data set."""
