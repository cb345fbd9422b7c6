"""Losses as functions of tensors: no model, no ranks, no tokenizer inside, so that NumPy can check them."""
