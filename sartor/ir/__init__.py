"""Intermediate representation: programs, capture, analyses and plans."""
