"""Corpora, objectives, tasks and metrics: the only package that knows SeqIO.

Importing the package itself stays cheap: each module is imported by name, so
that `packing` (numpy only) does not pay for TensorFlow.
"""
