"""Training codecs: exactly resumable, on one process or many."""
