"""The querying transformer (Q-Former), section 3.1 of the BLIP-2 paper."""
