"""What the sections of a report say, computed from a run's files: one module each."""
