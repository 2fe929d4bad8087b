"""Graphs that keep images apart and graphs that mix them, for the tests of the static proof."""
