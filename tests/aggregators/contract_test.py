"""What every registered aggregator promises, and what each does not.

A row of the table is a configuration, a column a promise. `lacks` names the
promises that a rule does not make, with its reason beside it; `mean` lacks
the one that makes a rule a defense, and a test shows that it does.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_safety import aggregators, tree
from fedjax_safety.aggregators import _rule

# The smallest cohort that two Byzantine clients leave Krum: 2 f + 3.
COHORT, BYZANTINE = 7, 2
KEY = jax.random.key(7)
# Sums of seven values of size 1 in float32, in any order.
TOLERANCE = 2e-6


class Case(NamedTuple):
  """A configuration; `runtime(deltas)` is what else its update is given."""

  name: str
  kwargs: dict
  lacks: frozenset = frozenset()
  runtime: Callable[..., dict] = lambda deltas: {}


_F = {'num_byzantine': BYZANTINE}
_NO_F = frozenset({'no_byzantine_is_mean'})
_CLIPPED = _NO_F | {'shift', 'affine'}


def _root(deltas) -> dict:
  """Returns a server's own delta: the median, whatever the rows hold."""
  return {'root_delta': aggregators.median(deltas)}


def _root_loss(deltas) -> dict:
  """Returns a loss that is least at the server's own delta."""
  root = aggregators.median(deltas)

  def loss_fn(delta):
    squares = jax.tree.map(lambda x, r: jnp.sum((x - r) ** 2), delta, root)
    return sum(jax.tree.leaves(squares))

  return {'loss_fn': loss_fn}


def _root_probe(deltas) -> dict:
  """Returns the same loss of adapters, and an adapter of zeros."""
  return {'adapter': _adapter(deltas), 'probe': _root_loss(deltas)['loss_fn']}


def _references(deltas) -> dict:
  """Returns references around the rows' median: one to each side of it."""
  root = aggregators.median(deltas)
  made = jax.tree.map(lambda x: jnp.stack([x, -x]), root)
  return {'references': lambda: (made, jnp.array([False, True]))}


CASES = {
  'mean': Case('mean', {}, frozenset({'outliers_bounded'})),
  'median': Case('median', {}, _NO_F),
  'trimmed_mean': Case('trimmed_mean', _F),
  'meamed': Case('meamed', _F),
  'phocas': Case('phocas', _F),
  # Signs change with the origin and have no size.
  'sign_majority': Case(
    'sign_majority',
    {},
    _NO_F | {'shift', 'scale', 'equal_rows', 'outliers_bounded'},
  ),
  # As the mean, with signs that change with the origin.
  'robust_learning_rate': Case(
    'robust_learning_rate',
    {'threshold': 4.0},
    _NO_F | {'shift', 'outliers_bounded'},
  ),
  # Krum selects one row, also without Byzantine ones.
  'krum': Case('krum', _F, _NO_F),
  'krum_byzfl': Case('krum', _F | {'variant': 'byzfl'}, _NO_F),
  'multi_krum': Case('multi_krum', _F, _NO_F),
  'multi_krum_byzfl': Case('multi_krum', _F | {'variant': 'byzfl'}),
  'multi_krum_openfedllm': Case('multi_krum', _F | {'variant': 'openfedllm'}),
  'dnc': Case('dnc', _F | {'num_iterations': 2}),
  # Angles change with the origin; equal rows are sybils; a lone outlier is
  # unlike all others and therefore trusted.
  'foolsgold': Case(
    'foolsgold',
    {},
    _NO_F | {'shift', 'equal_rows', 'outliers_bounded', 'affine'},
  ),
  'residual_reweighting': Case('residual_reweighting', {}, _NO_F | {'affine'}),
  # Angles to the root delta change with the origin; rows are scaled.
  'fltrust': Case(
    'fltrust', {}, _NO_F | {'shift', 'equal_rows', 'affine'}, _root
  ),
  'zeno': Case('zeno', _F, frozenset({'shift'}), _root_loss),
  # Rows are weighed by harm, whether there are Byzantine ones or not; which
  # rows are far too long depends on the origin.
  'safety_probe': Case('safety_probe', {}, _NO_F, _root_probe),
  # Angles change with the origin, and each leaf has its own; one that points
  # as honest ones do may be of any length.
  'update_probe': Case(
    'update_probe',
    {},
    _NO_F | {'shift', 'tree_is_vector', 'outliers_bounded'},
    _references,
  ),
  # Angles and norms change with the origin; rows are clipped.
  'flame': Case('flame', {'noise_multiplier': 0.0}, _CLIPPED),
  'clipped_clustering': Case('clipped_clustering', {}, _CLIPPED),
  'signguard': Case('signguard', {'sample_fraction': 1.0}, _CLIPPED),
  'alignins': Case('alignins', {}, _CLIPPED),
  # Small coordinates of a row become 0, and a leaf is a layer.
  'lasa': Case('lasa', {}, _CLIPPED | {'equal_rows', 'tree_is_vector'}),
  # As foolsgold, which it is in the first round.
  'foolsgold_history': Case(
    'foolsgold_history',
    {},
    _NO_F | {'shift', 'equal_rows', 'outliers_bounded', 'affine'},
  ),
  # The first round, without any history, is the mean.
  'fldetector': Case('fldetector', {}, _NO_F | {'outliers_bounded'}),
  'mda': Case('mda', _F),
  'smea': Case('smea', _F),
  'caf': Case('caf', _F),
  'geometric_median': Case('geometric_median', {}, _NO_F),
  # Norms change with the origin.
  'cge': Case('cge', _F, frozenset({'shift'})),
  # Which row is trusted is told by its place.
  'monna': Case('monna', _F | {'trusted_row': 3}, frozenset({'permutation'})),
  # A norm is given in the unit of the deltas, and rows are clipped to it.
  'norm_bounded_mean': Case(
    'norm_bounded_mean', {'max_norm': 6.0}, _CLIPPED | {'scale'}
  ),
  'centered_clipping': Case(
    'centered_clipping',
    {'clip_norm': 4.0, 'num_iterations': 4},
    _CLIPPED | {'scale'},
  ),
  # Two Byzantine clients need eleven: bulyan_test has them.
  'bulyan': Case(
    'bulyan', {'num_byzantine': 1}, frozenset({'affine', 'outliers_bounded'})
  ),
  # As norm_bounded_mean, but bad rows count as 0 in a mean over C, which may
  # be nearer to 0 than all honest values.
  'dp_mean': Case(
    'dp_mean',
    {'clip_norm': 6.0, 'noise_multiplier': 0.0},
    _CLIPPED | {'scale'},
  ),
  'dp_mean_adaptive': Case(
    'dp_mean_adaptive',
    {'initial_clip_norm': 6.0, 'noise_multiplier': 0.0},
    _CLIPPED | {'scale'},
  ),
}
# These add rows up instead of averaging them.
_SUMS = frozenset({'foolsgold', 'foolsgold_history'})


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
    state = aggregator.init(_adapter(deltas))
    extra = runtime(deltas)
    return aggregator.update(deltas, state, weights=weights, key=key, **extra)

  return update


def _adapter(deltas):
  """Returns the server's adapter before the first round."""
  return jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), deltas)


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
    output.state, aggregator.init(_adapter(deltas))
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


@pytest.mark.parametrize('case', sorted(_SUMS))
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
    scale=COHORT if case in _SUMS else 1,
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
  if case in _SUMS | _SIGNS:
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
