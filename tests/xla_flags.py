"""How tests compile: they do it more than they compute."""

from importlib import metadata

# Without optimization half the time, with the older code generator for fusions a
# third of that, for the same sums. Set in tests/conftest.py for all; a program
# that a test starts on one device takes these alone.
_QUICK = ['--xla_backend_optimization_level=0', '--xla_cpu_parallel_codegen_split_count=1']
if metadata.version('jaxlib').startswith('0.10.'):  # later ones know no older generator
  _QUICK.append('--xla_cpu_use_fusion_emitters=false')
QUICK = ' '.join(_QUICK)
