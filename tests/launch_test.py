"""The launch scripts, with the cloud replaced by a recorder."""

import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / 'launch'
CLOUD = {'PROJECT': 'project', 'ZONE': 'zone'}
GIN = ['--gin_file=a b.gin', "--gin.TASK_FEATURE_LENGTHS={'inputs': 512}"]


def run(*command, code=0, **environ):
  done = subprocess.run(
    [str(part) for part in command],
    capture_output=True,
    text=True,
    timeout=60,
    env={**os.environ, **environ},
  )
  assert done.returncode == code, done.stdout + done.stderr
  return done.stdout


def recorder(directory, name, action=''):
  """Makes a program that writes down its arguments, one a line."""
  path = directory / name
  log = directory / f'{name}.log'
  path.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" >> {log}\n{action}\n')
  path.chmod(path.stat().st_mode | stat.S_IEXEC)
  return log


@pytest.mark.skipif(not shutil.which('shellcheck'), reason='no shellcheck')
@pytest.mark.parametrize(
  'name', ['local_multiprocess.sh', 'tpu_pod.sh', 'slurm.sbatch', 'study.sbatch']
)
def test_shellcheck_finds_nothing(name):
  run('shellcheck', LAUNCH / name)


# ---- On this machine ----


def test_processes_know_their_number_and_find_each_other():
  script = LAUNCH / 'local_multiprocess.sh'
  show = 'echo $JAX_PROCESS_ID/$JAX_NUM_PROCESSES@$JAX_COORDINATOR_ADDRESS'
  lines = sorted(run(script, 3, 'bash', '-c', show).splitlines())
  found = [re.fullmatch(r'\[(\d)\] (\d)/3@127.0.0.1:(\d+)', x) for x in lines]
  assert [m and (m[1], m[2]) for m in found] == [('0', '0'), ('1', '1'), ('2', '2')]
  assert len({m[3] for m in found if m}) == 1


def test_the_first_failure_is_the_exit_code(tmp_path):
  script = LAUNCH / 'local_multiprocess.sh'
  run(script, 2, 'bash', '-c', 'exit $((5 * JAX_PROCESS_ID))', code=5)
  run(script, 0, 'true', code=2)
  run(script, 2, code=2)
  run(script, '--log_dir', tmp_path, 2, 'bash', '-c', 'echo $JAX_PROCESS_ID')
  assert (tmp_path / 'process_1.log').read_text() == '1\n'


def test_gpus_are_shared_out():
  script = LAUNCH / 'local_multiprocess.sh'
  out = run(script, '--dry_run', 2, 'a b', CUDA_VISIBLE_DEVICES='4,5,6,7')
  first, second = out.splitlines()
  assert r'CUDA_VISIBLE_DEVICES=4\,5 a\ b' in first
  assert r'CUDA_VISIBLE_DEVICES=6\,7 a\ b' in second
  assert 'JAX_PROCESS_ID=1' in second


def test_sigterm_reaches_every_process_which_may_take_its_time(tmp_path):
  code = (
    'import os, pathlib, signal, sys, time\n'
    'index = os.environ["JAX_PROCESS_ID"]\n'
    f'directory = pathlib.Path({str(tmp_path)!r})\n'
    'def stop(*_):\n'
    '  time.sleep(0.5)\n'
    '  (directory / f"saved{index}").touch()\n'
    '  sys.exit(0)\n'
    'signal.signal(signal.SIGTERM, stop)\n'
    '(directory / f"up{index}").touch()\n'
    'time.sleep(60)\n'
  )
  command = [LAUNCH / 'local_multiprocess.sh', '2', sys.executable, '-c', code]
  process = subprocess.Popen([str(part) for part in command])
  end = time.monotonic() + 60
  while len(list(tmp_path.glob('up*'))) < 2 and time.monotonic() < end:
    time.sleep(0.05)
  process.terminate()
  assert process.wait(timeout=60) == 0
  assert {p.name for p in tmp_path.glob('saved*')} == {'saved0', 'saved1'}


# ---- TPU slices ----


def tpu(*arguments, **environ):
  return run(LAUNCH / 'tpu_pod.sh', '--dry_run', *arguments, **CLOUD, **environ)


def test_a_dry_run_prints_commands_and_runs_none(tmp_path):
  log = recorder(tmp_path, 'gcloud')
  path = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'PACKAGE': 'gs://b/t.whl'}
  for action in ('create', 'wait', 'install', 'logs', 'status', 'stop'):
    assert tpu(action, **path).startswith('gcloud compute tpus')
  assert 'delete' in tpu('delete', **path)
  assert not log.exists()


@pytest.mark.parametrize(
  ('accelerator', 'runtime'),
  [
    ('v4-1024', 'tpu-ubuntu2204-base'),
    ('v5p-1024', 'v2-alpha-tpuv5'),
    ('v5litepod-256', 'v2-alpha-tpuv5-lite'),
    ('v6e-256', 'v2-alpha-tpuv6e'),
  ],
)
def test_each_chip_has_its_runtime(accelerator, runtime):
  line = tpu('create', ACCELERATOR=accelerator, SPOT='1')
  assert f'--accelerator-type={accelerator}' in line
  assert f'--runtime-version={runtime} ' in line
  assert '--spot' in line and '--node-id=t5x-lite' in line


def test_several_slices_get_every_command():
  assert '--node-count=2' in tpu('create', NUM_SLICES='2')
  lines = tpu('status', NUM_SLICES='2').splitlines()
  assert [' t5x-lite-0 ' in lines[0], ' t5x-lite-1 ' in lines[1]] == [True] * 2


def test_mistakes_end_with_2():
  script = LAUNCH / 'tpu_pod.sh'
  run(script, code=2)
  run(script, 'fly', code=2, **CLOUD)
  run(script, 'create', code=2, ACCELERATOR='a100', **CLOUD)
  run(script, 'run', code=2, **CLOUD)
  run(script, 'install', code=2, PACKAGE='', **CLOUD)  # of an index, anybody's
  run(script, 'install', code=2, PACKAGE='t5x_lite[tpu]', **CLOUD)


def test_the_wheel_is_fetched_and_installed_with_its_extra(tmp_path):
  home = tmp_path / 'home'
  (home / '.local' / 'bin').mkdir(parents=True)
  wheel = 't5x_lite-0.1.0-py3-none-any.whl'
  # gcloud compute ...: what ssh would run there, run here; gcloud storage: written down.
  ssh = f'[[ $1 == storage ]] || HOME={home} bash -c "${{!##*=}}"'
  gcloud = recorder(tmp_path, 'gcloud', ssh)
  recorder(tmp_path, 'curl', 'echo true')
  uv = recorder(home / '.local' / 'bin', 'uv')
  path = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'PACKAGE': f'gs://my-bucket/{wheel}'}
  run(LAUNCH / 'tpu_pod.sh', 'install', **CLOUD, **path)
  assert gcloud.read_text().splitlines()[-4:] == [
    'storage',
    'cp',
    f'gs://my-bucket/{wheel}',
    f'{home}/',
  ]
  assert uv.read_text().splitlines()[-1] == f'{home}/{wheel}[tpu]'


def test_arguments_survive_all_shells_and_a_crash_restarts(tmp_path):
  """The worker's shell is a real one; t5x-lite fails once, then is done."""
  home = tmp_path / 'home'
  home.mkdir()
  # gcloud ... --command=COMMAND: what ssh would run there, run here.
  recorder(tmp_path, 'gcloud', 'HOME=' + str(home) + ' bash -c "${!##*=}"')
  log = recorder(
    tmp_path,
    't5x-lite',
    f'[[ -e {tmp_path}/once ]] && exit 0; touch {tmp_path}/once; exit $((5 * T5X_LITE_TPU_SLICE))',
  )
  recorder(tmp_path, 'sleep')
  path = {'PATH': f'{tmp_path}:{os.environ["PATH"]}'}
  run(LAUNCH / 'tpu_pod.sh', 'run', 'train', *GIN, **CLOUD, **path)
  worker = home / 't5x-lite.log'
  end = time.monotonic() + 30
  while 'exit code 0' not in worker.read_text() and time.monotonic() < end:
    time.sleep(0.05)
  assert worker.read_text() == 'exit code 5\nexit code 0\n'
  assert log.read_text().splitlines() == ['train', *GIN] * 2


# ---- SLURM, Kubernetes ----


def test_slurm_starts_all_tasks_and_requeues_what_may_go_on(tmp_path):
  script = LAUNCH / 'slurm.sbatch'
  out = run('bash', script, 'train', *GIN, DRY_RUN='1')
  assert out.startswith('srun --kill-on-bad-exit=0 --wait=60 ')
  assert 't5x-lite train' in out
  scontrol = recorder(tmp_path, 'scontrol')
  environ = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'SLURM_JOB_ID': '7'}
  for code in (0, 2, 4, 7):
    recorder(tmp_path, 'srun', f'exit {code}')
    run('bash', script, 'train', code=code, **environ)
  assert not scontrol.exists()
  recorder(tmp_path, 'srun', 'exit 1')
  run('bash', script, 'train', code=1, SLURM_RESTART_COUNT='100', **environ)
  assert not scontrol.exists()
  recorder(tmp_path, 'srun', 'exit 5')
  run('bash', script, 'train', code=5, **environ)
  assert scontrol.read_text().split() == ['requeue', '7']
  # Stopped by the time limit's SIGTERM.
  recorder(tmp_path, 'srun', 'exit 6')
  run('bash', script, 'train', code=6, **environ)
  assert scontrol.read_text().split() == ['requeue', '7'] * 2


def test_the_manifest_is_a_jobset_that_restarts():
  yaml = pytest.importorskip('yaml')
  manifest = yaml.safe_load((LAUNCH / 'gke_jobset.yaml').read_text())
  assert manifest['kind'] == 'JobSet'
  assert manifest['spec']['failurePolicy']['maxRestarts'] > 10
  job = manifest['spec']['replicatedJobs'][0]['template']['spec']
  assert job['completionMode'] == 'Indexed'
  assert job['parallelism'] == job['completions']
  [container] = job['template']['spec']['containers']
  assert container['command'] == ['t5x-lite']
  assert container['args'][0] == 'train'
  for argument in container['args']:
    if argument.startswith('--gin_file='):
      assert (ROOT / argument.removeprefix('--gin_file=')).is_file()
  rule = job['podFailurePolicy']['rules'][0]['onExitCodes']
  assert rule['containerName'] == container['name']


def test_the_command_in_its_head_fills_in_the_manifest():
  yaml = pytest.importorskip('yaml')
  text = (LAUNCH / 'gke_jobset.yaml').read_text()
  edits = re.findall(r'-e (\S+)', text)
  assert len(edits) == 2
  filled = run('sed', *(x for edit in edits for x in ('-e', edit)), LAUNCH / 'gke_jobset.yaml')
  job = yaml.safe_load(filled)['spec']['replicatedJobs'][0]['template']['spec']
  [container] = job['template']['spec']['containers']
  assert container['image'] == 'us-docker.pkg.dev/P/R/t5x_lite:latest'
  assert '--gin.MODEL_DIR=gs://BUCKET/run' in container['args']


def test_the_image_copies_what_the_package_needs():
  lines = (LAUNCH / 'Dockerfile').read_text().splitlines()
  for line in lines:
    if line.startswith('COPY'):
      for name in line.split()[1:-1]:
        assert (ROOT / name).exists(), name
  assert lines[-1] == 'ENTRYPOINT ["t5x-lite"]'


def test_a_job_of_an_array_runs_its_cell(tmp_path):
  log = recorder(tmp_path, 't5x-lite', action='exit ${CODE:-0}')
  requeued = recorder(tmp_path, 'scontrol')
  path = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'SLURM_ARRAY_TASK_ID': '3'}
  script = LAUNCH / 'study.sbatch'
  assert 'study a.gin --cell 3 --launcher srun' in run('bash', script, 'a.gin', DRY_RUN='1', **path)
  run('bash', script, 'a.gin', **path)
  assert log.read_text().split()[:4] == ['study', 'a.gin', '--cell', '3']
  run('bash', script, 'a.gin', code=4, CODE='4', **path)
  assert not requeued.exists()
  run('bash', script, 'a.gin', code=6, CODE='6', SLURM_JOB_ID='77', **path)
  assert requeued.read_text().split() == ['requeue', '77']
  run('bash', script, code=2)
