"""Image encoders: one module per kind, found by its name."""
