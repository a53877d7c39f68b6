"""One training step, and what it costs."""
