"""From encoded inputs to output tokens: search, its steps, batches of ids.

Ids in, ids out: no text, no files, no SeqIO, no logging.
"""
