"""The H-Codec family."""
