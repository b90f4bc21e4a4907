"""The U-Codec family."""
