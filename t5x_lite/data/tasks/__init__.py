"""What a task is: a source, preprocessors and metrics under a SeqIO name.

The embedded ones, those made of a user's files, and the catalog of all. How
tokens are corrupted is in ../objectives, how rows are made in ../rows.
"""
