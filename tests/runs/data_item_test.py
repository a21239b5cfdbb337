from etils import epath

from t5x_lite.runs import data_item


class Position:
  def __init__(self):
    self.calls = []

  def save(self, directory):
    self.calls.append(('save', directory))

  def restore(self, directory):
    self.calls.append(('restore', directory))


def test_the_iterator_writes_and_reads_its_own_directory(tmp_path):
  position, handler = Position(), data_item.DataHandler()
  directory = epath.Path(tmp_path)
  handler.save(directory, data_item.DataSave(position))
  handler.restore(directory, data_item.DataRestore(position))
  assert position.calls == [
    ('save', str(tmp_path)), ('restore', str(tmp_path)),
  ]  # fmt: skip
