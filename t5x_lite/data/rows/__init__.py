"""How rows are made, of any task: examples to packed rows to batches, exactly resumable."""
