"""Whole models: what stage 1 trains, what stage 2 trains, and the demo's first fitting of an image encoder."""
