import pytest


@pytest.fixture(scope='session')
def saved(tmp_path_factory):
  """Returns (model, folder) of a variant that transformers saved."""
  pytest.importorskip('torch')
  pytest.importorskip('transformers')
  from tests.interop import hf_models

  done = {}

  def make(variant):
    if variant.name not in done:
      model = hf_models.make(variant)
      folder = tmp_path_factory.mktemp(variant.name) / 'model'
      model.save_pretrained(folder)
      done[variant.name] = (model, folder)
    return done[variant.name]

  return make
