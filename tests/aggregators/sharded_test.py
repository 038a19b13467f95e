"""Eight devices give what one gives, over clients and over parameters.

The devices are made in a process of their own, which runs this file.
"""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_safety
from fedjax_safety import aggregators

COHORT = 8
ROOT = pathlib.Path(fedjax_safety.__file__).resolve().parents[1]
KWARGS = {
  'dnc': {'num_byzantine': 2, 'num_coordinates': 40},
  'krum': {'num_byzantine': 2},
  'multi_krum': {'num_byzantine': 2},
  'trimmed_mean': {'num_byzantine': 2},
}


@pytest.mark.parametrize('axis', ['clients', 'parameters'])
def test_eight_devices_equal_one(axis):
  done = subprocess.run(
    [sys.executable, __file__, axis],
    env=os.environ
    | {
      'PYTHONPATH': str(ROOT),
      'JAX_PLATFORMS': 'cpu',
      'JAX_NUM_CPU_DEVICES': '8',
    },
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  assert set(done.stdout.split()) == set(aggregators.names())


def _check(axis: str) -> None:
  """Compares every registered rule and prints its name."""
  devices = jax.device_count()
  assert devices == 8
  mesh = jax.make_mesh(
    (devices,), (axis,), axis_types=(jax.sharding.AxisType.Auto,)
  )
  rng = np.random.default_rng(0)
  deltas = {
    'a': rng.standard_normal((COHORT, 8, 5)).astype(np.float32),
    'b': rng.standard_normal((COHORT, 16)).astype(np.float32),
  }
  deltas['b'][3, 4] = np.nan
  spec = jax.P(axis) if axis == 'clients' else jax.P(None, axis)
  spread = jax.device_put(deltas, jax.NamedSharding(mesh, spec))
  assert len(spread['a'].sharding.device_set) == 8
  key = jax.random.key(0)
  for name in aggregators.names():
    aggregator = aggregators.build(
      name, cohort_size=COHORT, **KWARGS.get(name, {})
    )
    update = jax.jit(
      lambda d, k, a=aggregator: a.update(d, (), weights=None, key=k)
    )
    one = update(jax.tree.map(jnp.asarray, deltas), key)
    many = update(spread, key)
    jax.tree.map(
      # Sums of eight rows of size 1 in another order.
      lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=5e-6),
      many,
      one,
    )
    print(name)


if __name__ == '__main__':
  _check(sys.argv[1])
