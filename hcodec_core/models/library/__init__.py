"""Codecs that the transformers library ships with one class each: Mimi, DAC, EnCodec.

One adapter each gives them our interface, our padding and trimming rules, our identities and our
file format. `hosting` is what every codec with modules of that library shares, X-Codec included.

Left out, and refused by name: X-Codec2 and NeuCodec, whose library classes take filter-bank
features that only torchaudio computes, beside the samples that an encoder here is given; EnCodec
for 48 kHz (stereo, normalised, in overlapping chunks) and for 32 kHz (not causal).
"""
