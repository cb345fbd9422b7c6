"""Where metrics go besides metrics.jsonl: ``build(cfg, *, folder, name, config, warn) -> logger`` with log() and close()."""
