"""Eight devices give what one gives, split over clients and parameters.

All rules, Krum after all preaggregators, and all attacks.

The devices are made in a process of their own, which runs this file.
"""

import functools
import math
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

import fedjax_safety
from fedjax_safety import aggregators, attacks
from fedjax_safety.aggregators import _rule

COHORT = 8
ROOT = pathlib.Path(fedjax_safety.__file__).resolve().parents[1]
KWARGS = {
  'bulyan': {'num_byzantine': 1},
  'caf': {'num_byzantine': 2},
  'centered_clipping': {'clip_norm': 4.0},
  'cge': {'num_byzantine': 2},
  'dnc': {'num_byzantine': 2, 'num_coordinates': 40},
  'dp_mean_adaptive': {'noise_multiplier': 0.5},
  'krum': {'num_byzantine': 2},
  'mda': {'num_byzantine': 2},
  'meamed': {'num_byzantine': 2},
  'monna': {'num_byzantine': 2},
  'multi_krum': {'num_byzantine': 2},
  'norm_bounded_mean': {'max_norm': 4.0},
  'phocas': {'num_byzantine': 2},
  'robust_learning_rate': {'threshold': 3.0},
  'smea': {'num_byzantine': 2},
  'trimmed_mean': {'num_byzantine': 2},
  'zeno': {'num_byzantine': 2},
}
PREAGGREGATORS = {
  'adaptive_clipping': {'num_byzantine': 1},
  'bucketing': {'bucket_size': 1},
  'nearest_neighbor_mixing': {'num_byzantine': 1},
  'static_clipping': {'max_norm': 4.0},
}


def _runtime(name: str, deltas) -> dict:
  """Returns what else a rule asks for: the server's delta or its loss."""
  root = jax.tree.map(lambda x: x[0], deltas)

  def loss_fn(delta):
    # A mean: differences of losses are as exact as a loss is large.
    squares = jax.tree.map(lambda x, r: jnp.mean((x - r) ** 2), delta, root)
    return sum(jax.tree.leaves(squares))

  zeros = jax.tree.map(jnp.zeros_like, root)
  extra = {
    'root_delta': root,
    'loss_fn': loss_fn,
    'adapter': zeros,
    'probe': loss_fn,
    'references': lambda: (
      jax.tree.map(lambda x: jnp.stack([x, -x]), root),
      jnp.array([False, True]),
    ),
  }
  return {k: v for k, v in extra.items() if k in aggregators.inputs(name)}


def test_eight_devices_equal_one():
  names = aggregators.names(), aggregators.preaggregator_names()
  checked = _in_eight_devices('equality')
  assert set(checked) == set().union(*names, attacks.names())


def test_coordinatewise_rules_gather_no_deltas():
  assert _in_eight_devices('programs') == _coordinatewise()


def _in_eight_devices(what: str) -> list[str]:
  """Runs this file on eight devices and returns the names it prints."""
  done = subprocess.run(
    [sys.executable, __file__, what],
    env=os.environ
    | {
      'PYTHONPATH': str(ROOT),
      'JAX_PLATFORMS': 'cpu',
      'JAX_NUM_CPU_DEVICES': '8',
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    },
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  return done.stdout.split()


def _first_round(name: str, aggregator, deltas, key):
  """Updates from a fresh state."""
  state = aggregator.init(jax.tree.map(lambda x: x[0] * 0, deltas))
  extra = _runtime(name, deltas)
  return aggregator.update(deltas, state, weights=None, key=key, **extra)


def _check() -> None:
  """Compares whatever is registered and prints its name."""
  assert jax.device_count() == 8
  rng = np.random.default_rng(0)
  # A pair of factors of eight layers, as one of the attacks asks for.
  deltas = {
    'a': rng.standard_normal((COHORT, 8, 4, 2)).astype(np.float32),
    'b': rng.standard_normal((COHORT, 8, 2, 3)).astype(np.float32),
  }
  deltas['b'][3, 4, 0, 1] = np.nan
  mesh = jax.make_mesh(
    (4, 2),
    ('clients', 'parameters'),
    axis_types=(jax.sharding.AxisType.Auto,) * 2,
  )
  spec = jax.NamedSharding(mesh, jax.P('clients', 'parameters'))
  spread = jax.device_put(deltas, spec)
  assert spread['a'].addressable_shards[0].data.shape == (2, 4, 4, 2)
  key = jax.random.key(0)
  for name, function in (_rounds() | _attacks()).items():
    compiled = jax.jit(function)
    one = compiled(jax.tree.map(jnp.asarray, deltas), key)
    jax.tree.map(
      # Sums of eight rows of size 1 in another order.
      lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=5e-6),
      compiled(spread, key),
      one,
    )
    print(name)


def _rounds() -> dict:
  """Returns the first round of each rule, of Krum after preaggregators."""
  rounds = {}
  for name in aggregators.names():
    aggregator = aggregators.build(
      name, cohort_size=COHORT, **KWARGS.get(name, {})
    )
    rounds[name] = functools.partial(_first_round, name, aggregator)
  for name, kwargs in PREAGGREGATORS.items():
    aggregator = aggregators.build(
      'krum',
      cohort_size=COHORT,
      num_byzantine=1,
      preaggregators=[{'name': name} | kwargs],
    )
    rounds[name] = functools.partial(_first_round, 'krum', aggregator)
  return rounds


def _attacks() -> dict:
  """Returns all attacks, as functions of deltas and key."""
  is_malicious = jnp.arange(COHORT) >= 6

  def on_deltas(name):
    attack, wanted = attacks.build(name), attacks.inputs(name)

    def attacked(deltas, key):
      server = jax.tree.map(lambda x: x[0], deltas)
      known = {'aggregate': aggregators.median, 'adapter': server}
      extra = {k: v for k, v in known.items() if k in wanted}
      return attack(deltas, is_malicious, key, **extra)

    return attacked

  return {name: on_deltas(name) for name in attacks.names()}


def _check_no_gathering() -> None:
  """Reads the programs of coordinate-wise rules over sharded parameters."""
  mesh = jax.make_mesh(
    (8,), ('parameters',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  spec = jax.NamedSharding(mesh, jax.P(None, 'parameters'))
  shapes = {'a': (COHORT, 64, 5), 'b': (COHORT, 4096)}
  deltas = {
    name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=spec)
    for name, shape in shapes.items()
  }
  for name in _coordinatewise():
    aggregator = aggregators.build(
      name, cohort_size=COHORT, **KWARGS.get(name, {})
    )
    update = jax.jit(functools.partial(_first_round, name, aggregator))
    program = update.lower(deltas, jax.random.key(0)).compile().as_text()
    assert not _moves(program), (name, _moves(program))
    print(name)
  # The reading of programs sees a gathering where there is one.
  gathering = jax.jit(
    lambda d: jax.lax.with_sharding_constraint(d['b'], spec.update(spec=()))
  )
  assert _moves(gathering.lower(deltas).compile().as_text())


def _coordinatewise() -> list[str]:
  """Returns the names of the coordinate-wise rules."""
  return [
    name
    for name in aggregators.names()
    if _rule.REGISTRY[name].kind == 'coordinatewise'
  ]


def _moves(program: str) -> list[str]:
  """Returns the lines that send arrays of the size of a leaf's row or more."""
  found = []
  for line in program.splitlines():
    match = re.search(
      r'= \(?\w+\[([\d,]*)\].* (all-gather|all-to-all|all-reduce|'
      r'collective-permute)(-start)?\(',
      line,
    )
    if match and math.prod(map(int, filter(None, match[1].split(',')))) >= 40:
      found.append(line)
  return found


if __name__ == '__main__':
  if sys.argv[1] == 'programs':
    _check_no_gathering()
  else:
    _check()
