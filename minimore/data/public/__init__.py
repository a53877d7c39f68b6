"""Public sets of preferences by their names."""
