"""Choosing a trade-off among the points of a finished grid."""
