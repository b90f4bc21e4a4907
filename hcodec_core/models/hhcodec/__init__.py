"""The HH-Codec family."""
