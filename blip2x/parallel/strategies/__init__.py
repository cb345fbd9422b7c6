"""One strategy per file: ``build(cfg, device) -> Context``."""
