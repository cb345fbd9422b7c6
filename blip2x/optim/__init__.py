"""AdamW, its parameter groups and its learning rate."""
