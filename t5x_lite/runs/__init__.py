"""What a run leaves on disk and says while it works; no TensorFlow: inference opens runs by it."""
