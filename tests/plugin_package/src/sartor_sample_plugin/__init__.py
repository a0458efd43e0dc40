"""Passes of another package, found through the entry points of group `sartor.passes`."""
