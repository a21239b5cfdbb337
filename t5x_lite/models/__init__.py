"""T5-family modules: one model file, every variant through its config."""
