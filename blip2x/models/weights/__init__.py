"""From files to parameters: strict, and saying what was left out and why."""
