"""A run that is killed and resumed equals one that was not, bit for bit."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from fedjax_safety import interrupt, metrics

ROUNDS = 4
ADAPTERS = ('federated', 'repair_public')

# Blocks, with the marker written, where the environment says so: the test then
# kills the process at a known moment instead of guessing at one.
_PROGRAM = """
import os, pathlib, sys, time
from fedjax_safety import checkpoint, main, metrics, workdir

def pause_at(owner, name, matches):
  real = getattr(owner, name)

  def paused(*args, **kwargs):
    if matches(*args, **kwargs):
      pathlib.Path(os.environ['MARKER']).touch()
      if os.environ.get('PAUSE') == 'forever':
        time.sleep(600)
      time.sleep(1)
    return real(*args, **kwargs)

  setattr(owner, name, paused)

at, _, number = os.environ.get('AT', '').partition(' ')
if at == 'round':
  pause_at(metrics.MetricsWriter, 'write', lambda self, record:
           record['kind'] == 'round' and record['round'] == int(number))
if at == 'checkpoint':
  # All is written and not committed yet, for which Orbax renames.
  pause_at(os, 'rename', lambda source, *_, **__:
           pathlib.Path(source).name.startswith(f'{number}.orbax'))
if at == 'repair':
  pause_at(metrics.MetricsWriter, 'write', lambda self, record:
           record['kind'] == 'repair' and record['step'] == int(number))
if at == 'evaluation':
  pause_at(workdir, 'write_lines', lambda path, rows: number in str(path))
sys.exit(main.run(sys.argv[1:]))
"""


@pytest.fixture(scope='module')
def start(quick_jax, tiny_config, tmp_path_factory):
  """Returns `(workdir, *overrides, at) -> (process, marker)`."""
  program = tmp_path_factory.mktemp('program') / 'program.py'
  program.write_text(_PROGRAM)
  root = pathlib.Path(__file__).parents[1]

  def run(workdir, *overrides, at='', pause='forever'):
    marker = workdir.parent / 'marker'
    path = os.pathsep.join([str(root), os.environ.get('PYTHONPATH', '')])
    process = subprocess.Popen(
      [
        sys.executable,
        str(program),
        'run',
        f'--config={tiny_config}',
        f'--workdir={workdir}',
        '--config.defense.repair.levels=public',
        '--config.server.optimizer=fedadam',
        '--config.server.learning_rate=0.01',
        *overrides,
      ],
      env={
        **os.environ,
        **quick_jax,
        'PYTHONPATH': path,
        'AT': at,
        'PAUSE': pause,
        'MARKER': str(marker),
      },
      stderr=subprocess.PIPE,
      stdout=subprocess.DEVNULL,
      text=True,
    )
    return process, marker

  return run


def _wait_for(marker, process):
  """Waits until the process is where it was told to pause."""
  while not marker.exists():
    assert process.poll() is None, process.stderr.read()
    time.sleep(0.05)


def _finish(process):
  """Waits for success and returns what was said."""
  _, stderr = process.communicate(timeout=600)
  assert process.returncode == 0, stderr
  return stderr


def _adapters(workdir):
  """Returns the bytes of every adapter of a run."""
  directory = workdir / 'runs' / 'run' / 'seed_0' / 'adapters'
  file = 'adapter_model.safetensors'
  return {name: (directory / name / file).read_bytes() for name in ADAPTERS}


@pytest.fixture(scope='module')
def uninterrupted(start, tmp_path_factory):
  """The adapters and answers of a run that nothing disturbed."""
  workdir = tmp_path_factory.mktemp('uninterrupted') / 'run'
  _finish(start(workdir)[0])
  return workdir


@pytest.mark.parametrize(
  'at',
  [
    'round 0',
    'checkpoint 2',
    pytest.param('round 3', marks=pytest.mark.slow),
    'repair 10',
    pytest.param('evaluation federated', marks=pytest.mark.slow),
    pytest.param('evaluation repair_public', marks=pytest.mark.slow),
  ],
)
def test_killed_and_resumed(start, uninterrupted, tmp_path, at):
  workdir = tmp_path / 'run'
  process, marker = start(workdir, at=at)
  _wait_for(marker, process)
  os.kill(process.pid, signal.SIGKILL)
  process.communicate()
  assert not (workdir / 'report.html').exists()
  _finish(start(workdir)[0])
  assert _adapters(workdir) == _adapters(uninterrupted)
  answers = 'runs/run/seed_0/evaluations/repair_public.jsonl'
  assert (workdir / answers).read_text() == (
    uninterrupted / answers
  ).read_text()
  rounds = [
    r['round']
    for r in metrics.read(workdir / 'metrics.jsonl')
    if r['kind'] == 'round'
  ]
  assert rounds == list(range(ROUNDS))


def test_sigterm_finishes_the_round_and_says_how_to_resume(
  start, uninterrupted, tmp_path
):
  workdir = tmp_path / 'run'
  process, marker = start(workdir, at='round 0', pause='short')
  _wait_for(marker, process)
  process.send_signal(signal.SIGTERM)
  _, stderr = process.communicate(timeout=600)
  assert process.returncode == interrupt.EXIT_CODE == 143, stderr
  assert f'--workdir={workdir}' in stderr.splitlines()[-1]
  assert 'Traceback' not in stderr
  saved = workdir / 'runs' / 'run' / 'seed_0' / 'checkpoints'
  done = {int(p.name) for p in saved.iterdir()}
  assert done and max(done) < ROUNDS
  recorded = [
    r['round'] + 1
    for r in metrics.read(workdir / 'metrics.jsonl')
    if r['kind'] == 'round'
  ]
  assert set(recorded) == done
  # The same directory, but another config: refused by name, then told to.
  other = '--config.client.learning_rate=0.02'
  process, _ = start(workdir, other)
  _, stderr = process.communicate(timeout=600)
  assert process.returncode == 2
  assert 'client.learning_rate: 0.01 -> 0.02' in stderr
  _finish(start(workdir)[0])
  assert _adapters(workdir) == _adapters(uninterrupted)


def test_another_config_continues_if_it_is_allowed(
  start, uninterrupted, tmp_path
):
  workdir = tmp_path / 'run'
  process, marker = start(workdir, at='round 1')
  _wait_for(marker, process)
  os.kill(process.pid, signal.SIGKILL)
  process.communicate()
  other = '--config.client.learning_rate=0.02'
  _finish(start(workdir, other, '--allow_config_change')[0])
  assert _adapters(workdir) != _adapters(uninterrupted)
