"""Ranks, degrees, collectives and seeding; how ranks share the work is a strategy."""
