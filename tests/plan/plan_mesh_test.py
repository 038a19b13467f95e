"""A plan for eight devices: what each of them gathers, holds and sends."""

import json
import os
import pathlib
import subprocess
import sys


def test_weights_are_gathered_and_activations_are_not_summed(
  quick_jax, tiny_config
):
  """Every device works on its own examples, with whole weights."""
  root = str(pathlib.Path(__file__).parents[2])
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'fedjax_safety.main',
      'plan',
      '--json',
      f'--config={tiny_config}',
      '--config.client.population=4',
      '--config.client.cohort_size=4',
      '--config.client.batch_size=4',
      '--config.performance.mesh=2,4,1',
    ],
    env={
      **os.environ,
      **quick_jax,
      'PYTHONPATH': os.pathsep.join([root, os.environ.get('PYTHONPATH', '')]),
      'JAX_NUM_CPU_DEVICES': '8',
    },
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  plan = json.loads(done.stdout)
  # Kernels of two layers and the head, three quarters of each. So few layers
  # are not looped over, and all steps share what was gathered.
  kernels = 2 * 16 * (4 * 16 + 3 * 32) + 16 * 32
  assert plan['sent']['all-gather'] >= 4 * kernels * 3 / 4
  # Factors of rank 2 on q and v: one sum a client and step, twice in all.
  adapter = 2 * 2 * 2 * (16 + 16)
  sums = 2 * 4 * adapter * 2 * 3 / 4
  # The activations of one layer alone would be 4 * 16 * (7 * 16 + 2 * 32).
  assert plan['sent']['all-reduce'] < 8 * sums
  assert plan['num_devices'] == 8 and plan['seconds'] == {}
