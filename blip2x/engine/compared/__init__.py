"""The parts of a comparison of runs: reading, differences, metrics, plots, tables. Nothing here imports paddle."""
