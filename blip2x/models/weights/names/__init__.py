"""How others call what we call ours: one table per family of files."""
