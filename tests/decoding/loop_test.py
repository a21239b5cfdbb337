"""Prompts, stages, and what processors are shown."""

import jax.numpy as jnp
import pytest

from t5x_lite.decoding import loop


@pytest.mark.parametrize(
  ('length', 'ends'), [(1, [1]), (32, [32]), (33, [32, 33]), (300, [32, 128, 300])]
)
def test_few_stages_end_at_the_length(length, ends):
  assert loop.stages(length) == ends


def test_history_is_start_prefix_and_new_tokens():
  tokens = jnp.asarray([[7, 8, 0], [9, 4, 0]])
  read = loop.history(None, 3, tokens, jnp.asarray(2), None)
  assert read.tokens_RT.tolist() == [[3, 7, 8, 0], [3, 9, 4, 0]]
  assert read.length_R.tolist() == [3, 3]
  tokens_RP, lengths_R = jnp.asarray([[3, 5, 6], [3, 0, 0]]), jnp.asarray([3, 1])
  prompt = loop.Prompt(tokens_RP, lengths_R, jnp.zeros((2, 9)))
  read = loop.history(prompt, 3, tokens, jnp.asarray(2), None)
  rows = zip(read.tokens_RT.tolist(), read.length_R.tolist(), strict=True)
  assert [row[:n] for row, n in rows] == [[3, 5, 6, 7, 8], [3, 9, 4]]
