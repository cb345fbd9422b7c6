"""Kinds of annotation files, one module each; see `blip2x.data.rows.Format` for what a module offers."""
