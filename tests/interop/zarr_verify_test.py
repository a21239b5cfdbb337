import json

import pytest
from etils import epath

from t5x_lite.errors import DamagedError
from t5x_lite.interop import checkpoint_source, zarr
from t5x_lite.interop.checkpoint_source import open_source
from t5x_lite.parallel import checksums
from t5x_lite.programs import convert
from t5x_lite.runs import checkpoints
from tests import tiny_run


@pytest.fixture
def step(tmp_path):
  tiny_run.save_untrained(tmp_path / 'run')
  return tmp_path / 'run' / 'checkpoints' / '1'


def flip(path, place):
  data = bytearray(path.read_bytes())
  data[place] ^= 1
  path.write_bytes(data)


def largest(root):
  files = [path for path in root.rglob('*') if path.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


def test_what_is_whole_passes(step):
  zarr.verify(str(step))
  meta = checkpoints.read_meta(epath.Path(step))
  assert meta['format_version'] == 2 and 'step' in meta['checksums']


def test_one_flipped_byte_is_told(step):
  path = largest(step / 'state')
  flip(path, path.stat().st_size // 2)
  with pytest.raises(DamagedError, match='params'):
    zarr.verify(str(step))
  # Whoever opens the run hears of it.
  with pytest.raises(DamagedError, match='there is no other'):
    open_source(str(step.parent.parent))


@pytest.mark.parametrize('item', ['state', 'meta'])
def test_a_lost_item_is_told(step, item):
  epath.Path(step / item).rmtree()
  with pytest.raises(DamagedError, match=f'{item} is missing'):
    zarr.verify(str(step))


def test_an_array_without_its_store_is_told(step):
  path = step / 'meta' / 'metadata'
  meta = json.loads(path.read_text())
  meta['checksums']['params.more'] = 1
  path.write_text(json.dumps(meta))
  with pytest.raises(DamagedError, match='is not as it was written'):
    zarr.verify(str(step))
  path.write_text(json.dumps(checksums.signed(meta)))
  with pytest.raises(DamagedError, match=r'has lost params\.more'):
    zarr.verify(str(step))


def test_what_convert_writes_has_checksums(step, tmp_path):
  out = tmp_path / 'out'
  convert.convert(source=str(step), destination=str(out), scan_layers=False)
  [made] = (out / 'checkpoints').iterdir()
  zarr.verify(str(made))
  arrays = [p for p in (made / 'state').rglob('*') if p.name == '0.0']
  flip(arrays[0], arrays[0].stat().st_size // 2)
  with pytest.raises(DamagedError):
    checkpoint_source.open_source(str(out))
