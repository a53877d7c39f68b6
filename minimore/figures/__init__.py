"""Figures: of a report, and of the log of a run."""
