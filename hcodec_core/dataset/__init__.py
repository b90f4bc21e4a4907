"""From a listing of audio objects to published versions of a token table."""
