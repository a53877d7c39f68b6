"""minimore."""
