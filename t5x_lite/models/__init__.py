"""The T5 family: one model file, every variant through its config.

Modules hold parameters and static configuration; randomness and caches are arguments.
"""
