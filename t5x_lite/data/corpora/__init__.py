"""Embedded corpora and the official T5 vocabulary; see README.md beside it."""
