"""Scoring codecs on held-out audio, and whether a challenger is no worse than the champion.

Nothing here imports torch but ``local_models``: verdicts are also made where there is none. A codec
comes in as ``sides.CodecUnderTest``; the command line builds one from an engine.
"""
