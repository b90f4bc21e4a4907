"""From an audio file of any allowed container to float32 samples at the rate of a codec."""
