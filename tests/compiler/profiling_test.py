"""A real trace of a step whose parts are known, and the table made of it."""

import gzip
import json
import re

import jax
import jax.numpy as jnp
import pytest

from t5x_lite.compiler import profiling
from t5x_lite.models import attention

WIDTH = 64


@pytest.fixture(scope='module')
def program():
  """Attention, a projection and an update, as a step has them."""

  def loss(w, x):
    q = (x @ w).reshape(2, 16, 4, 16)
    return jnp.sum(attention.attention(q, q, q) ** 2)

  def step(w, x):
    grad = jax.grad(loss)(w, x)
    with jax.named_scope('optimizer'):
      return w - 0.1 * jnp.sign(grad) * jnp.sqrt(jnp.abs(w))

  shapes = (jnp.ones((WIDTH, WIDTH)), jnp.ones((2, 16, WIDTH)))
  return jax.jit(step).lower(*shapes).compile(), shapes


def test_times_are_without_what_is_inside():
  events = [(0, 100, 'loop'), (10, 30, 'a'), (15, 5, 'b'), (50, 20, 'a'), (100, 7, 'c')]
  found: dict[str, int] = {}
  for name, time in profiling.self_times(events):
    found[name] = found.get(name, 0) + time
  assert found == {'loop': 50, 'a': 45, 'b': 5, 'c': 7}
  assert list(profiling.self_times([])) == []


def test_operations_are_told_apart(program):
  kinds = profiling.operation_kinds(program[0].as_text())
  found = {kind for kind, _ in kinds.values()}
  assert {'attention', 'matmuls', 'optimizer'} <= found
  text = """HloModule m
%fused (p: f32[8,8]) -> f32[8,8] {
  ROOT %dot.1 = f32[8,8]{1,0} dot(%p, %p), metadata={op_name="jit(f)/jvp(mlp)/dot"}
}

ENTRY %main (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0), metadata={op_name="state.params[\'attention\'][\'q\']"}
  %fusion.1 = f32[8,8] fusion(%p), calls=%fused, metadata={op_name="transpose(jvp(mlp))/dot"}
  %gemm.2 = f32[8,8]{1,0} custom-call(%p, %p), custom_call_target="__cublas$gemm"
  %softmax.3 = f32[8,8] exponential(%p), metadata={op_name="f/transpose(jvp(attention))/exp"}
  %all-reduce-start.4 = f32[8,8]{1,0} all-reduce-start(%p), replica_groups={}, to_apply=%add
  ROOT %while.5 = f32[8,8]{1,0} while(%p), condition=%c, body=%b
}
"""
  kinds = profiling.operation_kinds(text)
  assert kinds['fusion.1'] == ('matmuls', 'dot backward')
  assert kinds['gemm.2'][0] == 'matmuls' and kinds['p'][0] == 'everything else'
  assert kinds['softmax.3'] == ('attention', 'exp backward')
  assert kinds['all-reduce-start.4'][0] == 'communication'
  assert kinds['while.5'][0] == 'loops and calls'


def run(program, profiler, steps):
  compiled, (w, x) = program
  texts = []
  for step in range(steps):
    profiler.before(step, w)
    with profiling.part('dispatch'):
      w = compiled(w, x)
    texts.append(profiler.after(step + 1, w, compiled))
  profiler.stop()
  return texts


def test_a_trace_and_its_table(tmp_path, program):
  profiler = profiling.StepProfiler(str(tmp_path), first_step=0, last_step=9, num_steps=3)
  texts = run(program, profiler, 9)
  (text,) = filter(None, texts)
  assert texts.index(text) == 7  # after 5 steps to warm up
  assert text.startswith('steps 6 to 8')
  assert (tmp_path / 'profile' / 'summary.txt').read_text() == text + '\n'
  loop, by_kind, longest = re.split(r' +ms/step +share +', text)[1:]
  assert {'dispatch', 'wait for the device'} <= set(re.findall(r'% +(\S.*)', loop))
  shares = {name: float(share) for share, name in re.findall(r'([\d.]+)% +(\S.*)', by_kind)}
  assert {'attention', 'matmuls'} <= shares.keys()
  assert sum(shares.values()) == pytest.approx(100, abs=0.5)
  assert len(longest.splitlines()) <= 13
  # Perfetto's file is there too.
  (trace,) = tmp_path.glob('profile/plugins/profile/*/*.trace.json.gz')
  names = {
    event.get('name') for event in json.loads(gzip.decompress(trace.read_bytes()))['traceEvents']
  }
  assert 't5x_lite: dispatch' in names


def test_short_and_interrupted_loops(tmp_path, program):
  def profiler(**settings):
    return profiling.StepProfiler(str(tmp_path), **settings)

  assert not any(run(program, profiler(first_step=0, last_step=4, num_steps=None), 4))
  assert not (tmp_path / 'profile').exists()
  # More steps than there are: all of them.
  texts = run(program, profiler(first_step=0, last_step=2, num_steps=50), 2)
  assert texts[-1].startswith('steps 1 to 2')
  # A loop that ends early ends its trace: another can begin.
  assert not any(run(program, profiler(first_step=0, last_step=3, num_steps=3), 2))
  assert any(run(program, profiler(first_step=0, last_step=1, num_steps=1), 1))
