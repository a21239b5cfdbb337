"""gin as a thin front over keyword-only functions and frozen dataclasses.

The only folder that knows gin: files and bindings in, a checked call out.
"""
