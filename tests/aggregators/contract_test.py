"""What every registered aggregator promises, and what each does not.

The table is in contract_cases.py: a row is a configuration, a test a promise.
That the mean lacks the one which makes a rule a defense is tested as well.
"""

import functools
import importlib.util
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_safety import aggregators, tree
from fedjax_safety.aggregators import _rule

_SPEC = importlib.util.spec_from_file_location(
  'contract_cases', pathlib.Path(__file__).with_name('contract_cases.py')
)
cases = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(cases)
CASES, SUMS = cases.CASES, cases.SUMS
COHORT, BYZANTINE = cases.COHORT, cases.BYZANTINE

KEY = jax.random.key(7)
# Sums of seven values of size 1 in float32, in any order.
TOLERANCE = 2e-6


def promising(promise: str):
  """Parametrizes a test over the cases that make a promise."""
  return pytest.mark.parametrize(
    'case', [c for c in CASES if promise not in CASES[c].lacks]
  )


@functools.cache
def _update(case: str, **overrides):
  """Returns a jitted update of a case, compiled once for each shape."""
  return jax.jit(_plain_update(case, **overrides))


def _plain_update(case: str, **overrides):
  """Returns an update of a case: one round from a fresh state."""
  name, kwargs, _, runtime = CASES[case]
  aggregator = aggregators.build(name, cohort_size=COHORT, **kwargs | overrides)

  def update(deltas, key=KEY, weights=None):
    state = aggregator.init(cases.adapter(deltas))
    extra = runtime(deltas)
    return aggregator.update(deltas, state, weights=weights, key=key, **extra)

  return update


def _deltas(seed: int = 0) -> dict:
  """Returns honest deltas: a common direction and some spread."""
  rng = np.random.default_rng(seed)
  return {
    name: jnp.asarray(rng.standard_normal((COHORT, *shape)) + 0.5, jnp.float32)
    for name, shape in (('a', (3, 4)), ('b', (5,)))
  }


def _close(got, want, scale: float = 1.0):
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(
      g, w, rtol=0, atol=TOLERANCE * scale
    ),
    got,
    want,
  )


def _poisoned(value, rows=(1, 6)) -> dict:
  return jax.tree.map(lambda x: x.at[jnp.array(rows)].set(value), _deltas())


def test_table_covers_the_registry():
  assert {case.name for case in CASES.values()} == set(aggregators.names())


@pytest.mark.parametrize('case', CASES)
def test_output_has_the_promised_form(case):
  deltas = _deltas()
  output = _update(case)(deltas)
  name, kwargs, _, _ = CASES[case]
  aggregator = aggregators.build(name, cohort_size=COHORT, **kwargs)
  chex.assert_trees_all_equal_shapes_and_dtypes(
    output.state, aggregator.init(cases.adapter(deltas))
  )
  assert int(output.metrics['num_nonfinite']) == 0
  for name, leaf in deltas.items():
    assert output.delta[name].shape == leaf.shape[1:]
  if output.client_weights is not None:
    assert output.client_weights.shape == (COHORT,)
    assert output.client_weights.dtype == jnp.float32
    assert float(output.client_weights.min()) >= 0
    assert float(output.client_weights.sum()) == pytest.approx(1, abs=1e-6)


@promising('affine')
def test_client_weights_give_the_delta(case):
  output = _update(case)(_deltas())
  if output.client_weights is None:
    assert _rule.REGISTRY[CASES[case].name].kind == 'coordinatewise'
  else:
    _close(output.delta, tree.mix(output.client_weights, _deltas()))


@pytest.mark.parametrize('case', CASES)
def test_jit_equals_no_jit(case):
  deltas = _deltas()['a']
  _close(_update(case)(deltas).delta, _plain_update(case)(deltas).delta)


@pytest.mark.parametrize('case', CASES)
def test_vmap_equals_a_loop(case):
  runs = jnp.stack([_deltas(seed)['a'] for seed in range(3)])
  got = jax.vmap(_update(case))(runs).delta
  for run, delta in zip(runs, got, strict=True):
    _close(delta, _update(case)(run).delta)


@promising('permutation')
def test_permuted_rows_give_the_same_delta(case):
  order = np.random.default_rng(1).permutation(COHORT)
  plain = _update(case)(_deltas())
  permuted = _update(case)(jax.tree.map(lambda x: x[order], _deltas()))
  _close(permuted.delta, plain.delta)
  if plain.client_weights is not None:
    _close(permuted.client_weights, plain.client_weights[order])


@promising('shift')
def test_shift_of_all_rows_shifts_the_delta(case):
  offset = jax.tree.map(lambda x: 4.0 * x[0], _deltas(seed=2))
  shifted = jax.tree.map(lambda x, o: x + o, _deltas(), offset)
  want = jax.tree.map(
    lambda x, o: x + o, _update(case)(_deltas()).delta, offset
  )
  _close(_update(case)(shifted).delta, want, scale=16)


@pytest.mark.parametrize('scale', [2.0**-20, 2.0**20])
@promising('scale')
def test_scale_of_all_rows_scales_the_delta(case, scale):
  scaled = jax.tree.map(lambda x: scale * x, _deltas())
  want = jax.tree.map(lambda x: scale * x, _update(case)(_deltas()).delta)
  _close(_update(case)(scaled).delta, want, scale=scale)


@promising('equal_rows')
def test_equal_rows_are_a_fixed_point(case):
  row = jax.tree.map(lambda x: x[0], _deltas())
  equal = jax.tree.map(lambda x: jnp.stack([x] * COHORT), row)
  _close(_update(case)(equal).delta, row)


@pytest.mark.parametrize('case', sorted(SUMS))
def test_foolsgold_returns_nothing_for_equal_rows(case):
  equal = jax.tree.map(lambda x: jnp.broadcast_to(x[0], x.shape), _deltas())
  output = _update(case)(equal)
  assert all(not leaf.any() for leaf in jax.tree.leaves(output.delta))
  assert not output.client_weights.any()


@promising('no_byzantine_is_mean')
def test_without_byzantine_clients_it_is_the_mean(case):
  overrides = {'num_byzantine': 0} if case != 'mean' else {}
  want = jax.tree.map(
    lambda x: np.asarray(x, np.float64).mean(axis=0), _deltas()
  )
  _close(_update(case, **overrides)(_deltas()).delta, want)


@pytest.mark.parametrize('case', CASES)
def test_bfloat16_stays_and_is_computed_in_float32(case):
  narrow = _deltas()['a'].astype(jnp.bfloat16)
  got = _update(case)(narrow).delta
  assert got.dtype == jnp.bfloat16
  # One rounding at the end, to 8 bits.
  np.testing.assert_allclose(
    got.astype(jnp.float32),
    _update(case)(narrow.astype(jnp.float32)).delta,
    rtol=2.0**-8,
    atol=1e-6,
  )


@promising('tree_is_vector')
def test_tree_equals_the_flattened_vector(case):
  leaves = jax.tree.leaves(_deltas())
  flat = jnp.concatenate([x.reshape(COHORT, -1) for x in leaves], axis=1)
  got = jax.tree.leaves(_update(case)(_deltas()).delta)
  _close(
    jnp.concatenate([x.reshape(-1) for x in got]),
    _update(case)(flat).delta,
    scale=COHORT if case in SUMS else 1,
  )


# Signs are no means and may lie outside of what the rows hold.
_SIGNS = {'sign_majority', 'robust_learning_rate'}


def _far_from_honest(delta, rows=(1, 6)) -> float:
  """Returns how far, in honest ranges, a delta lies outside of them."""
  honest = np.setdiff1d(np.arange(COHORT), rows)
  worst = 0.0
  for name, leaf in _deltas().items():
    low, high = leaf[honest].min(axis=0), leaf[honest].max(axis=0)
    outside = jnp.maximum(low - delta[name], delta[name] - high)
    worst = max(worst, float(jnp.max(outside / (high - low))))
  return worst


_BAD_VALUES = {'nan': jnp.nan, 'inf': jnp.inf, 'minus_inf': -jnp.inf}


@pytest.mark.parametrize('value', _BAD_VALUES)
@pytest.mark.parametrize('case', CASES)
def test_nonfinite_rows_are_harmless_and_counted(case, value):
  output = _update(case)(_poisoned(_BAD_VALUES[value]))
  assert int(output.metrics['num_nonfinite']) == BYZANTINE
  if output.client_weights is not None:
    assert not output.client_weights[jnp.array([1, 6])].any()
    assert float(output.client_weights.sum()) == pytest.approx(1, abs=1e-6)
  if case in SUMS | _SIGNS:
    assert bool(tree.all_finite(output.delta))
  else:
    assert _far_from_honest(output.delta) <= 1e-6


@pytest.mark.parametrize('case', CASES)
def test_one_bad_entry_counts_as_a_bad_row(case):
  deltas = _deltas()
  deltas['b'] = deltas['b'].at[4, 2].set(jnp.nan)
  output = _update(case)(deltas)
  assert int(output.metrics['num_nonfinite']) == 1
  assert bool(tree.all_finite(output.delta))
  if output.client_weights is not None:
    assert output.client_weights[4] == 0


@pytest.mark.parametrize('case', CASES)
def test_nothing_but_bad_rows_gives_a_delta_of_zero(case):
  output = _update(case)(_poisoned(jnp.nan, range(COHORT)))
  assert int(output.metrics['num_nonfinite']) == COHORT
  for leaf in jax.tree.leaves(output.delta):
    np.testing.assert_array_equal(leaf, 0.0)


@pytest.mark.parametrize('case', CASES)
def test_more_bad_rows_than_assumed_still_give_a_finite_delta(case):
  output = _update(case)(_poisoned(jnp.inf, range(4)))
  assert bool(tree.all_finite(output.delta))


def _bounded(case: str, size: float) -> bool:
  """Says whether two colluding outliers stay without much influence."""
  delta = _update(case)(_poisoned(size)).delta
  return bool(tree.all_finite(delta)) and _far_from_honest(delta) <= 1e-3


@pytest.mark.parametrize('size', [1e3, -1e6, 1e15])
@promising('outliers_bounded')
def test_outlier_rows_are_bounded(case, size):
  assert _bounded(case, size)


@pytest.mark.parametrize('size', [1e3, -1e6, 1e15])
def test_outlier_rows_are_not_bounded_by_the_mean(size):
  assert not _bounded('mean', size)


@pytest.mark.parametrize('case', CASES)
def test_only_the_mean_heeds_weights(case):
  weights = jnp.zeros(COHORT).at[3].set(2.0)
  got = _update(case)(_deltas(), weights=weights).delta
  if case == 'mean':
    _close(got, jax.tree.map(lambda x: x[3], _deltas()))
  else:
    _close(got, _update(case)(_deltas()).delta)


@pytest.mark.parametrize('bad', [jnp.nan, jnp.inf, -1.0])
def test_mean_ignores_rows_of_unusable_weight(bad):
  got = aggregators.mean(_deltas(), weights=jnp.ones(COHORT).at[0].set(bad))
  want = jax.tree.map(lambda x: x[1:].mean(axis=0), _deltas())
  _close(got, want)


def test_mean_of_no_weight_is_zero():
  got = aggregators.mean(_deltas(), weights=jnp.zeros(COHORT))
  _close(got, jax.tree.map(lambda x: jnp.zeros(x.shape[1:]), _deltas()))
