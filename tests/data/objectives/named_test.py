import pytest
import seqio

from t5x_lite.data.objectives import named
from t5x_lite.data.tasks import catalog, from_files
from t5x_lite.data.vocabularies import VocabularyConfig

BYTES = VocabularyConfig(kind='byte')


@pytest.mark.parametrize('objective', named.OBJECTIVES)
def test_every_objective_makes_examples(tmp_path, objective):
  name = f'named_test_{objective}'
  (tmp_path / 'x.txt').write_text('to be or not to be ' * 20)
  from_files.register_text_task(name, train_file=str(tmp_path / 'x.txt'), objective=objective)
  task = seqio.get_mixture_or_task(catalog.resolve(name, BYTES))
  dataset = task.get_dataset({'inputs': 32, 'targets': 32}, split='train')
  found = list(dataset.as_numpy_iterator())
  assert found
  for key in task.output_features:
    assert all(0 < len(e[key]) <= 32 for e in found), key
