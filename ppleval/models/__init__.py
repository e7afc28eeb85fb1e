"""Models of transformers: load and check one, run it, tell two apart."""
