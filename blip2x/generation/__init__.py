"""Decoding with the semantics of the papers' code: greedy, beams, sampling; models come in through a protocol."""
