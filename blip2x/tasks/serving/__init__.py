"""A model behind a web page and a JSON API: what waits, what is kept, what is answered; task=serve puts it together."""
