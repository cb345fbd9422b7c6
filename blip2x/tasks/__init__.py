"""One task per file, found by its name: ``task=caption`` is caption.py."""
