"""Tests of the round compiled for TPU slices, of which none is at hand.

The whole round of a run at 7B goes through the TPU's own compiler.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip('libtpu')

# Weights of Llama 2 7B: all layers', the last product's of them, and those of
# embedding and head each.
LAYERS, DOWN, END = 32 * 202_383_360, 32 * 4_096 * 11_008, 32_000 * 4_096
CONFIG = """
from fedjax_safety import config as config_lib

def get_config():
  config = config_lib.default()
  config.model.dtype = 'bfloat16'
  config.client.population = 4
  config.client.cohort_size = 4
  config.client.batch_size = 4
  config.performance.remat = True
  return config
"""


def _plan(folder, topology, mesh):
  """Returns the plan of four clients on a slice, made in a new process."""
  path = folder / 'plan.py'
  path.write_text(CONFIG)
  root = pathlib.Path(__file__).parents[2]
  done = subprocess.run(
    [
      sys.executable,
      '-m',
      'fedjax_safety.main',
      'plan',
      '--json',
      f'--config={path}',
      '--shape=llama2-7b',
      f'--topology={topology}',
      f'--config.performance.mesh={mesh}',
    ],
    env=os.environ
    | {
      'PYTHONPATH': os.pathsep.join([str(root), *sys.path]),
      'TF_CPP_MIN_LOG_LEVEL': '0',
    },
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert 'Involuntary full rematerialization' not in done.stderr
  return json.loads(done.stdout)


# Each takes a compiler of few threads some minutes, however few the layers.
@pytest.mark.slow
@pytest.mark.parametrize(
  'topology, mesh',
  [
    ('v5e:4x4', (4, 4, 1)),
    ('v5p:2x2x2', (4, 2, 1)),
    ('v6e:4x4', (4, 4, 1)),
  ],
)
def test_seven_billion_weights_fit_a_slice(tmp_path, topology, mesh):
  plan = _plan(tmp_path, topology, ','.join(map(str, mesh)))
  clients, fsdp, _ = mesh
  assert plan['fits'] and plan['num_devices'] == clients * fsdp
  assert plan['memory']['total'] < 0.5 * plan['memory']['limit']
  # The embedding is not split over fsdp, all other weights are.
  share = 2 * END + 2 * (LAYERS + END) / fsdp
  assert share < plan['memory']['arguments'] < 1.05 * share
  # A layer's weights are whole while it computes, those of no other layer.
  assert plan['memory']['temporaries'] < 2e9
  # Two passes, and the blocks once more but for their last product, which no
  # gradient needs.
  least = 6 * LAYERS - 2 * DOWN + 4 * END
  assert least < plan['flops'] / plan['tokens'] < 1.1 * least
  if plan['sent'] is not None:
    # Each of ten steps gathers layers at least twice and the head once; what
    # else goes around is adapters.
    gathered = 10 * 2 * (2 * LAYERS + END) * (fsdp - 1) / fsdp
    assert plan['sent']['all-gather'] > 0.9 * gathered
    assert plan['sent']['all-reduce'] < 0.1 * plan['sent']['all-gather']
