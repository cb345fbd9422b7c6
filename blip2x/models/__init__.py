"""Networks only: no losses, no training, no files of a run."""
