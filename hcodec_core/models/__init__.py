"""Codec families, one folder each; `registry` is the only table of them."""
