"""All that knows SeqIO; modules are imported by name: `packing` does not pay for TensorFlow."""
