"""From files of preferences to batches of pairs."""
