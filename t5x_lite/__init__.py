"""T5 in JAX, small enough to read.

Names are imported when first used: `import t5x_lite` alone takes milliseconds, and
neither it nor the model, the steps and the decoding ever import TensorFlow.

Folders, from the top floor down; imports only go down (docs/architecture.md): gin_front, programs,
evaluation, interop, runs, compiler, decoding, training, models, data, parallel. Beside them main.py
is the command line, api.py the Python interface.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
  from t5x_lite.api import Model as Model
  from t5x_lite.api import load as load
  from t5x_lite.api import new as new
  from t5x_lite.data.config import DatasetConfig as DatasetConfig
  from t5x_lite.data.tasks.catalog import register_mixture as register_mixture
  from t5x_lite.data.tasks.from_files import register_file_task as register_file_task
  from t5x_lite.data.tasks.from_files import register_text_task as register_text_task
  from t5x_lite.data.vocabularies import VocabularyConfig as VocabularyConfig
  from t5x_lite.decoding.config import DecodingConfig as DecodingConfig
  from t5x_lite.errors import UsageError as UsageError
  from t5x_lite.models.config import T5Config as T5Config
  from t5x_lite.models.config import named_config as named_config
  from t5x_lite.parallel.host_memory import keep_freed_memory as keep_freed_memory
  from t5x_lite.parallel.partitioning import MeshConfig as MeshConfig
  from t5x_lite.programs.convert import convert as convert
  from t5x_lite.programs.evaluate import evaluate as evaluate
  from t5x_lite.programs.infer import infer as infer
  from t5x_lite.programs.train import train as train
  from t5x_lite.runs.checkpoints import CheckpointConfig as CheckpointConfig
  from t5x_lite.training.losses import LossConfig as LossConfig
  from t5x_lite.training.optimizers import OptimizerConfig as OptimizerConfig
  from t5x_lite.training.schedules import ScheduleConfig as ScheduleConfig

__version__ = '0.1.0'
__all__ = (
  'CheckpointConfig DatasetConfig DecodingConfig LossConfig MeshConfig Model OptimizerConfig '
  'ScheduleConfig T5Config UsageError VocabularyConfig convert evaluate infer keep_freed_memory '
  'load named_config new register_file_task register_mixture register_text_task train'
).split()
