"""A `VocabularyConfig` as the SeqIO vocabulary that the tasks are built on."""

import functools

import seqio

from t5x_lite.data import vocabularies


@functools.lru_cache(maxsize=16)
def to_seqio(config: vocabularies.VocabularyConfig) -> seqio.Vocabulary:
  """Returns SeqIO's vocabulary with the same ids; one object per equal config."""
  # Fails with our message now, not with TensorFlow's in a pipeline thread.
  vocabularies.make_vocabulary(config)
  if config.kind == 'byte':
    return seqio.ByteVocabulary(extra_ids=config.extra_ids)
  if config.kind == 'passthrough':
    return seqio.PassThroughVocabulary(config.size, eos_id=vocabularies.EOS_ID)
  return seqio.SentencePieceVocabulary(vocabularies.model_path(config), extra_ids=config.extra_ids)
