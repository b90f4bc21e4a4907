"""Codecs that the transformers library ships with one class each: Mimi, DAC, EnCodec.

One adapter each gives them our interface, our padding and trimming rules, our identities and our
file format. `hosting` is what every codec with modules of that library shares, X-Codec included.
"""
