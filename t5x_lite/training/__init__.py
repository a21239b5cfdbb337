"""The pure parts of training: loss, optimizer, schedule, state and step.

Arrays in, arrays out: no files, no SeqIO, no logging, no loop.
"""
