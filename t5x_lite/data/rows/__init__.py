"""How rows are made: examples to packed rows to batches, exactly resumable.

Nothing here knows what a task means; only reading it needs TensorFlow.
"""
