"""Corpora, objectives, tasks and metrics: the only package that knows SeqIO.

Each module is imported by name, so that `packing` (numpy only) does not pay for TensorFlow.
"""
