import json
import statistics

import pytest

from t5x_lite.compiler import flops
from t5x_lite.data.config import DatasetConfig
from t5x_lite.programs import study_report
from t5x_lite.programs.study import Grid, Stage
from t5x_lite.runs import run_directory
from tests import tiny_run

SCORES = {
  'BLEU': ['infer_eval/t/bleu'],
  'loss': ['eval/t/loss'],
  'both': ['infer_eval/t/a + infer_eval/t/b', 'infer_eval/t/bleu'],
}
STAGES = [
  Stage(name='train', bindings={'SEED': '{seed}', 'ROW': 0}, scores=SCORES),
  Stage(
    name='test',
    command='eval',
    bindings={'FROM': '{train}'},
    scores={'EM': ['infer_eval/squad/em + squad/em']},
  ),
]
ROWS = {'base': {}, 'good': {'train': {'ROW': 1}}, 'bad': {'train': {'ROW': 2}}}
BLEU = {'base': [20.0, 20.2, 20.1], 'good': [21.0, 21.2, 21.1], 'bad': [19.95, 20.05, 20.0]}


@pytest.fixture(name='table')
def written(tmp_path):
  """A study whose runs were written by hand."""
  grid = Grid(STAGES, ROWS, str(tmp_path))
  cells = {(row, seed): grid.cell(row, seed) for row in ROWS for seed in range(3)}
  for (row, seed), (train, test) in cells.items():
    run_directory.write_run(
      train.directory,
      model=tiny_run.model(),
      vocabulary=tiny_run.VOCABULARY,
      config={'dataset': tiny_run.dataset(), 'total_steps': 20},
    )
    bleu = BLEU[row][seed]
    decoded = {'infer_eval/t/bleu': bleu, 'infer_eval/t/a': 5, 'infer_eval/t/b': 1}
    later = {'infer_eval/t/bleu': bleu - 1, 'infer_eval/t/a': 0, 'infer_eval/t/b': 5}
    lines = [
      {'step': 10, 'eval/t/loss': 1.5, **decoded},
      {'step': 20, 'eval/t/loss': 2.0 - seed, 'loss': 1.0, **later},
    ]
    with open(f'{train.directory}/metrics.jsonl', 'w') as file:
      file.writelines(json.dumps(line) + '\n' for line in lines)
    run_directory.write_run(test.directory, model=tiny_run.model(), vocabulary=tiny_run.VOCABULARY)
    with open(f'{test.directory}/metrics.json', 'w') as file:
      json.dump({'tasks': {'squad': {'em': 50.0 + seed}}}, file)
    for one in (train, test):
      with open(f'{one.directory}/outcome.json', 'w') as file:
        json.dump({'exit_code': 0, 'seconds': 30.0}, file)
  paper = {'base': {'BLEU': 27.0}, 'good': {'BLEU': 28.0}}
  return study_report.Table(cells, 'base', paper, {'BLEU': 0.1})


def test_scores_are_the_best_of_a_run_as_in_the_paper(table):
  assert table.values['BLEU'] == BLEU
  # The lower of two losses; the mean of two metrics of one step, then the best.
  assert table.values['loss']['base'] == [1.5, 1.0, 0.0]
  assert table.values['both']['base'] == [(3 + x) / 2 for x in BLEU['base']]
  assert table.values['EM']['bad'] == [50.0, 51.0, 52.0]


def test_the_deviation_is_pooled_over_rows(table):
  variances = [statistics.variance(values) for values in BLEU.values()]
  assert table.deviation('BLEU') == pytest.approx(statistics.fmean(variances) ** 0.5)


def test_differences_of_two_deviations_are_marked(table):
  assert table.cell('BLEU', 'good') == '**21.10 ± 0.10** ↑'
  assert table.cell('BLEU', 'base') == '20.10 ± 0.10'
  assert table.cell('BLEU', 'bad') == '20.00 ± 0.05'
  assert table.cell('loss', 'bad').startswith('**')  # equal to all others


def test_one_seed_is_compared_by_the_published_deviation(table):
  cells = {key: runs for key, runs in table.cells.items() if key[1] == 0}
  one = study_report.Table(cells, 'base', table.paper, {'BLEU': 0.1})
  assert one.deviation('BLEU') == 0.1 and one.deviation('EM') is None
  assert one.cell('BLEU', 'good') == '**21.00** ↑'
  assert one.cell('BLEU', 'bad') == '19.95' and one.cell('EM', 'bad') == '50.00'


def test_the_paper_and_the_cost_stand_beside(table, tmp_path):
  header, rows = table.lines()
  good = dict(zip(header, rows[1], strict=True))
  assert good['BLEU, paper'] == '28.0' and rows[2][2] == ''
  dataset: DatasetConfig = tiny_run.dataset()
  size = {'batch_size': dataset.batch_size, 'inputs': 32, 'targets': 16}
  step = 3 * flops.forward_flops(tiny_run.model(), **size)
  assert good['training FLOPs'] == f'{20 * step:.2e}'
  assert good['FLOPs of a step (M)'] == f'{step:.3g} (1.00)'
  assert good['parameters (P)'].endswith(' (1.00)')
  assert (good['seeds'], good['time']) == ('3 of 3', '0:01:00')
  assert rows[0][0] == '★ base'
  path = study_report.write(table, str(tmp_path / 'report' / 'table'), 'A <title>')
  page = (tmp_path / 'report' / 'table.html').read_text()
  assert 'A &lt;title&gt;' in page and '<b>21.10 ± 0.10</b> ↑' in page
  assert page.count('<figure>') == 4 + 5  # columns, and curves: the loss and four metrics
  text = open(path).read()
  assert text.startswith('# A <title>\n') and 'What did not finish' not in text
