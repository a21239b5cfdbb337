"""Checkpoints of other codebases: Hugging Face and T5X, in both directions.

Every format is read into, and written from, tensors under canonical names (tensor_names.py), each
read when and as far as it is asked for (tensors.py): a conversion streams, and a restore onto a
mesh reads only what each device keeps. No torch, no transformers.
"""
