"""What a run leaves on disk and says while it works.

Its directory, checkpoints, metrics and size. Nothing here computes, and nothing
here may import TensorFlow: inference opens runs through it.
"""
