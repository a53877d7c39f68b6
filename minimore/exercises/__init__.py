"""Exercises that are graded: one function left blank, and checks that say what is wrong."""
