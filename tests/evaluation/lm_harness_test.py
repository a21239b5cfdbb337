"""The harness scores our model as it scores the same weights in transformers."""

import json
from typing import Any

import pytest

pytest.importorskip('lm_eval')
pytest.importorskip('transformers')

import lm_eval
import lm_eval.tasks
import transformers
from lm_eval.models.huggingface import HFLM

import t5x_lite
from t5x_lite.errors import UsageError
from t5x_lite.evaluation import lm_harness
from tests.models import tiny

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{{{{answer}}}}"
{more}
"""
CHOICE = """
doc_to_choice: ["yes", "no", "perhaps so"]
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
GENERATE = """
generation_kwargs: {until: ["x"], max_gen_toks: 10, do_sample: false}
metric_list: [{metric: exact_match}]
"""
ROLLING = """
metric_list: [{metric: byte_perplexity}]
"""


@pytest.fixture(scope='module')
def model():
  # lm-eval 0.4.13 ties the embeddings of transformers 5.23 whatever the config says, and there as
  # many decoder as encoder layers are needed to generate.
  cfg = tiny.config(vocab_size=384, logits_via_embedding=True, num_decoder_layers=2)
  return t5x_lite.Model(cfg, tiny.params(cfg), t5x_lite.VocabularyConfig(kind='byte'))


def test_tasks_give_the_numbers_of_the_hf_model(model, tmp_path):
  rows = [
    {'question': f'Is {i} {"more" * (i % 3)} than 2? ', 'answer': 'yes' if i % 2 else 'no'}
    for i in range(6)
  ]
  (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  given: dict[str, Any] = {'data': tmp_path / 'rows.jsonl'}
  question = '{{question}}'
  for name, kind, text, more in (
    ('choice', 'multiple_choice', question, CHOICE),
    ('write', 'generate_until', question, GENERATE),
    ('rolling', 'loglikelihood_rolling', '', ROLLING),
  ):
    task = TASK.format(name=name, kind=kind, text=text, more=more, **given)
    (tmp_path / f'{name}.yaml').write_text(task)
  model.save(str(tmp_path / 'hf'), format='hf')
  theirs = HFLM(
    pretrained=transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / 'hf'),
    tokenizer=transformers.ByT5Tokenizer(),
    backend='seq2seq',
    batch_size=4,
    max_length=24,
  )
  ours = lm_harness.LanguageModel(model, batch_size=4, max_length=24)
  known = lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
  found, expected = (
    lm_eval.simple_evaluate(
      model=one,
      tasks=['choice', 'write', 'rolling'],
      task_manager=known,
      log_samples=True,
      bootstrap_iters=0,
    )
    for one in (ours, theirs)
  )
  for name, results in expected['results'].items():
    for metric, value in results.items():
      if isinstance(value, float):
        assert found['results'][name][metric] == pytest.approx(value, rel=1e-4), (name, metric)
    for a, b in zip(found['samples'][name], expected['samples'][name], strict=True):
      _same(a['resps'], b['resps'])


def _same(a, b):
  if isinstance(b, list | tuple):
    assert len(a) == len(b)
    for pair in zip(a, b, strict=True):
      _same(*pair)
  else:
    assert a == (pytest.approx(b, rel=1e-4) if isinstance(b, float) else b)


def test_a_decoder_alone_is_refused():
  cfg = tiny.config(architecture='decoder')
  with pytest.raises(UsageError, match='encoder-decoder'):
    lm_harness.LanguageModel(t5x_lite.Model(cfg, tiny.params(cfg)))
