"""Running codecs: batch shapes, the worker loop, parity with reference outputs."""
