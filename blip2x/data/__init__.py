"""Pictures and texts: where they come from, how they become arrays, how they become batches. NumPy only, no tensors."""
