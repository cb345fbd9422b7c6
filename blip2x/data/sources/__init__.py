"""Data sets, one module per kind; see `blip2x.data.source.Source` for what a data set gives."""
