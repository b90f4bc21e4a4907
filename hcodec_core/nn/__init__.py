"""Building blocks of neural codecs that know no codec by name."""
