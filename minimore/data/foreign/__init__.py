"""Public files of preferences, whatever their shape, as house records."""
