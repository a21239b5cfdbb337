"""Rows written out from the paper's Appendix D, and t5's own examples."""

import functools

import pytest
import tensorflow as tf

from t5x_lite.data.tasks import benchmarks, text_formats


def convert(fn, **row):
  """Returns (inputs, targets) of every example made of a row."""
  dataset = fn(tf.data.Dataset.from_tensors(row))
  return [
    (example['inputs'].decode(), example['targets'].decode())
    for example in dataset.as_numpy_iterator()
  ]


def task_format(name):
  """Returns the first preprocessor of a task."""
  return benchmarks.find(name).preprocessors[0]


# Name of the task, row, inputs, targets: Raffel et al. 2020, D.1 to D.17.
APPENDIX_D = [
  (
    'glue_cola_v002',
    {'sentence': 'John made Bill master of himself.', 'label': 1},
    'cola sentence: John made Bill master of himself.',
    'acceptable',
  ),
  (
    'glue_rte_v002',
    {
      'sentence1': 'A smaller proportion of Yugoslavia\u2019s Italians were settled in Slovenia.',
      'sentence2': 'Slovenia has 5,460 inhabitants.',
      'label': 1,
    },
    'rte sentence1: A smaller proportion of Yugoslavia\u2019s Italians were settled in Slovenia. '
    'sentence2: Slovenia has 5,460 inhabitants.',
    'not_entailment',
  ),
  (
    'glue_mnli_v002',
    {
      'hypothesis': 'The St. Louis Cardinals have always won.',
      'premise': 'yeah well losing is i mean i\u2019m i\u2019m originally from Saint Louis',
      'label': 2,
    },
    'mnli hypothesis: The St. Louis Cardinals have always won. premise: yeah well losing is i mean '
    'i\u2019m i\u2019m originally from Saint Louis',
    'contradiction',
  ),
  (
    'glue_mrpc_v002',
    {
      'sentence1': 'We acted because we saw the existing evidence in a new light.',
      'sentence2': 'Rather, the US acted because the administration saw it.',
      'label': 1,
    },
    'mrpc sentence1: We acted because we saw the existing evidence in a new light. sentence2: '
    'Rather, the US acted because the administration saw it.',
    'equivalent',
  ),
  (
    'glue_qnli_v002',
    {'question': 'Where did Jebe die?', 'sentence': 'Jebe died on the road.', 'label': 0},
    'qnli question: Where did Jebe die? sentence: Jebe died on the road.',
    'entailment',
  ),
  (
    'glue_qqp_v002',
    {'question1': 'What attributes?', 'question2': 'How can I?', 'label': 0},
    'qqp question1: What attributes? question2: How can I?',
    'not_duplicate',
  ),
  (
    'glue_sst2_v002',
    {'sentence': 'it confirms fincher \u2019s status as a film maker', 'label': 1},
    'sst2 sentence: it confirms fincher \u2019s status as a film maker',
    'positive',
  ),
  (
    'glue_stsb_v002',
    {
      'sentence1': 'Representatives for Puretunes could not immediately be reached.',
      'sentence2': 'Puretunes representatives could not be located.',
      'label': 3.25,
    },
    'stsb sentence1: Representatives for Puretunes could not immediately be reached. sentence2: '
    'Puretunes representatives could not be located.',
    '3.2',
  ),
  (
    'super_glue_cb_v102',
    {
      'hypothesis': 'Valence was helping',
      'premise': 'Valence the void-brain, Valence the virtuous valet.',
      'label': 1,
    },
    'cb hypothesis: Valence was helping premise: Valence the void-brain, Valence the virtuous '
    'valet.',
    'contradiction',
  ),
  (
    'super_glue_copa_v102',
    {
      'question': 'effect',
      'premise': 'Political violence broke out in the nation.',
      'choice1': 'Many citizens relocated to the capitol.',
      'choice2': 'Many citizens took refuge in other territories.',
      'label': 1,
    },
    'copa choice1: Many citizens relocated to the capitol. choice2: Many citizens took refuge in '
    'other territories. premise: Political violence broke out in the nation. question: effect',
    'choice2',
  ),
  (
    'super_glue_multirc_v102',
    {
      'question': 'Who was Joey going to visit?',
      'answer': 'Roseville',
      'paragraph': '<b>Sent 1: </b>Joey was going.<br><b>Sent 2: </b>Then he came.<br>',
      'label': 0,
      'idx': {'paragraph': 1, 'question': 2, 'answer': 3},
    },
    'multirc question: Who was Joey going to visit? answer: Roseville paragraph: Sent 1: Joey was '
    'going. Sent 2: Then he came. ',
    'False',
  ),
  (
    'super_glue_wic_v102',
    {
      'word': 'place',
      'sentence1': 'It was the deliberation.',
      'sentence2': 'The nations meeting.',
      'label': 0,
    },
    'wic sentence1: It was the deliberation. sentence2: The nations meeting. word: place',
    'False',
  ),
  (
    'super_glue_boolq_v102',
    {'passage': 'Persian is spoken.', 'question': 'do iran speak it', 'label': 1},
    'boolq passage: Persian is spoken. question: do iran speak it',
    'True',
  ),
  (
    'super_glue_axb_v102',
    {'sentence1': 'The cat sat.', 'sentence2': 'It sat.', 'label': -1},
    'rte hypothesis: It sat. premise: The cat sat.',
    '<unk>',
  ),
  (
    'super_glue_wsc_v102_simple_train',
    {
      'text': 'The stable was very roomy , with four good stalls ; a large swinging window opened '
      'into the yard , which made it pleasant and airy.',
      'span1_text': 'The stable',
      'span2_text': 'it',
      'span2_index': 22,
      'label': 1,
    },
    'wsc: The stable was very roomy , with four good stalls ; a large swinging window opened into '
    'the yard , which made *it* pleasant and airy.',
    'The stable',
  ),
  (
    'dpr_v001_simple',
    {
      'sentence': 'Bob asked Tom if he can lend some money.',
      'pronoun': 'he',
      'candidates': ['Bob', 'Tom'],
      'label': 1,
    },
    'wsc: Bob asked Tom if *he* can lend some money.',
    'Tom',
  ),
  (
    'cnn_dailymail_v002',
    {'article': 'marouane fellaini and adnan januzaj', 'highlights': 'the belgian duo .'},
    'summarize: marouane fellaini and adnan januzaj',
    'the belgian duo .',
  ),
  (
    # Printed with the punctuation as it was; t5's code has spaces around it.
    'squad_v010_allanswers',
    {
      'question': 'What does it displace?',
      'context': 'Hyperbaric (high-pressure) medicine.',
      'answers': {'text': ['carbon monoxide', 'CO']},
    },
    'question: What does it displace ? context: Hyperbaric ( high - pressure ) medicine . ',
    'carbon monoxide',
  ),
  (
    'wmt_t2t_ende_v003',
    {'en': '"Luigi often said to me."', 'de': '"Luigi sagte oft zu mir."'},
    'translate English to German: "Luigi often said to me."',
    '"Luigi sagte oft zu mir."',
  ),
  (
    'wmt16_enro_v003',
    {'en': 'Taco Bell said.', 'ro': 'Taco Bell a afirmat.'},
    'translate English to Romanian: Taco Bell said.',
    'Taco Bell a afirmat.',
  ),
  (
    'wmt15_enfr_v003',
    {'en': 'This image section.', 'fr': 'Ce d\u00e9tail.'},
    'translate English to French: This image section.',
    'Ce d\u00e9tail.',
  ),
  (
    'trivia_qa_open',
    {'question': 'Who?', 'answer': {'value': 'Bob', 'aliases': ['Bob', 'Bobby']}},
    'trivia_qa question: Who?',
    'Bob',
  ),
  (
    'xnli_dev_test.de',
    {
      'premise': {'en': 'Cat.', 'de': 'Katze.'},
      'hypothesis': {'language': ['de', 'en'], 'translation': ['Tier.', 'Animal.']},
      'label': 2,
    },
    'xnli: premise: Katze. hypothesis: Tier.',
    '2',
  ),
]


@pytest.mark.parametrize(
  ('name', 'row', 'inputs', 'targets'), APPENDIX_D, ids=[row[0] for row in APPENDIX_D]
)
def test_appendix_d(name, row, inputs, targets):
  assert convert(task_format(name), **row) == [(inputs, targets)]


def test_record_is_an_example_an_answer():
  row = {
    'query': 'A @placeholder is a bird.',
    'entities': ['penguin', 'potato', 'pigeon'],
    'answers': ['penguin', 'pigeon'],
    'passage': 'It rained.\n@highlight\nA bird\n@highlight\nEnd',
    'idx': {'passage': 1, 'query': 2},
  }
  inputs = (
    'record query: A @placeholder is a bird. entities: penguin, potato, pigeon passage: It rained. '
    'A bird. End'
  )
  assert convert(text_formats.cloze, **row) == [(inputs, 'penguin'), (inputs, 'pigeon')]
  row['answers'] = tf.zeros([0], tf.string)
  assert convert(text_formats.cloze, **row) == [(inputs, '<unk>')]


@pytest.mark.parametrize(('label', 'want'), [(0.0, '0.0'), (4.9, '4.8'), (1.75, '1.8'), (5, '5.0')])
def test_similarities_are_fifths(label, want):
  row = {'sentence1': 'a', 'sentence2': 'b', 'label': float(label)}
  assert convert(text_formats.similarity, **row)[0][1] == want


def test_wsc_marks_the_pronoun_where_the_index_is_off():
  fn = functools.partial(text_formats.winograd, only_right=False)
  row = {'span1_text': 'x', 'label': 0}
  want = 'wsc: They might want to use *it* , but'
  got = convert(fn, text='They might want to use it , but', span2_text='it', span2_index=4, **row)
  assert got == [(want, 'x')]
  got = convert(fn, text='"Good for him," he said.', span2_text='him', span2_index=2, **row)
  assert got[0][0] == 'wsc: "Good for *him* ," he said.'
  only = functools.partial(text_formats.winograd, only_right=True)
  assert convert(only, text='a it b', span2_text='it', span2_index=1, **row) == []


@pytest.mark.parametrize(
  ('premise', 'hypothesis', 'inputs', 'noun'),
  [
    (
      'The fish ate the worm. It was tasty.',
      'The worm was tasty.',
      'wsc: The fish ate the worm. *It* was tasty.',
      'The worm',
    ),
    (
      "Jane knocked on Susan's door but she did not answer.",
      'Susan did not answer.',
      "wsc: Jane knocked on Susan's door but *she* did not answer.",
      'Susan',
    ),
    (
      "Steve follows Fred's example in everything. He influences him hugely.",
      'Steve influences him hugely.',
      "wsc: Steve follows Fred's example in everything. *He* influences him hugely.",
      'Steve',
    ),
    (
      'Sara borrowed the book. She reads it when she gets home.',
      'She reads the book when she gets home.',
      'wsc: Sara borrowed the book. She reads *it* when she gets home.',
      'the book',
    ),
  ],
)
def test_wnli_becomes_wsc(premise, hypothesis, inputs, noun):
  fn = text_formats.winograd_from_entailment
  assert convert(fn, sentence1=premise, sentence2=hypothesis, label=1) == [(inputs, noun)]


def test_wiki40b_loses_its_marks():
  text = '\n_START_ARTICLE_\nX\n_START_PARAGRAPH_\nOne._NEWLINE_Two.'
  dataset = text_formats.wiki40b(tf.data.Dataset.from_tensors({'text': text}))
  assert next(dataset.as_numpy_iterator())['targets'] == b'X\nOne.\nTwo.'
