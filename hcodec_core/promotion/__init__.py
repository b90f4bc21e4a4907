"""Which version of a codec is the champion: registering, the gate's decision, promotion, rollback.

Not to be confused with ``models.registry``, the table of codec families: here versions of trained
codecs are named in an MLflow model registry. Nothing here imports torch.
"""
