"""Tasks, a source, preprocessors and metrics under a SeqIO name: ours, of files, and a catalog."""
