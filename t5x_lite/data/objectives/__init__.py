"""What a model is trained to do with plain text: the pre-training objectives.

TensorFlow on the tokens of one example; no sources, no vocabularies' files.
"""
