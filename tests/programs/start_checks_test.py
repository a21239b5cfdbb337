import pytest

from t5x_lite.data.tasks import catalog
from t5x_lite.errors import UsageError
from t5x_lite.programs import start_checks
from tests import tiny_run

BYTES = tiny_run.VOCABULARY


def test_names_of_the_catalog_get_the_models_vocabulary():
  resolved = start_checks.resolve_dataset(tiny_run.dataset('pronounce'), tiny_run.model(), BYTES)
  assert resolved.mixture_or_task_name == 'pronounce_byte'
  assert catalog.short_name('pronounce_byte', BYTES) == 'pronounce'
  assert catalog.short_name('my_task', BYTES) == 'my_task'
  assert catalog.short_name('my_task_byte', BYTES) == 'my_task_byte'


@pytest.mark.parametrize(
  'data, cfg, message',
  [
    (dict(name='pronunce'), {}, 'pronounce'),
    (dict(module='no_such_module'), {}, 'no_such_module'),
    (dict(decoder_start_id=2), {}, 'decoder_start_id=2'),
    ({}, dict(architecture='decoder'), "needs 'lm' or 'prefix_lm'"),
    ({}, dict(architecture='encoder'), 'needs none that trains'),
  ],
)
def test_data_must_fit_the_model(data, cfg, message):
  with pytest.raises(UsageError, match=message):
    start_checks.resolve_dataset(tiny_run.dataset(**data), tiny_run.model(**cfg), BYTES)


def test_a_run_needs_a_directory(tmp_path):
  cfg = tiny_run.model()
  start_checks.check_model_dir(str(tmp_path), cfg, BYTES)
  with pytest.raises(UsageError, match="model_dir is ''"):
    start_checks.check_model_dir('', cfg, BYTES)


def test_counts_are_positive():
  start_checks.check_positive('train.total_steps', 1)
  with pytest.raises(UsageError, match=r'train\.total_steps is 0'):
    start_checks.check_positive('train.total_steps', 0)
  start_checks.check_positive('train.eval_steps', None)
