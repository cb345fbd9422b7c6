"""What ``task=benchmark`` measures: one module per kind of measurement."""
