"""Evaluators: what is measured of a model, in training and after it.

Metric functions belong to the tasks (data/metrics.py), decoding to decoding/.
"""
