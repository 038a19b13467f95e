"""What every registered attack promises.

A row of the table is a configuration, a column a promise. `lacks` names the
promises that an attack does not make, with its reason beside it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_safety import aggregators, attacks

pytestmark = pytest.mark.usefixtures('quick_compiles')

COHORT = 7
MASK = jnp.array([False, True, False, False, True, False, False])
NOBODY = jnp.zeros(COHORT, bool)
KEY = jax.random.key(3)


class Case(NamedTuple):
  name: str
  kwargs: dict
  lacks: frozenset = frozenset()


# Draws are made leaf by leaf, so that no leaf is concatenated to another.
_DRAWS = frozenset({'flat'})
CASES = {
  'alie': Case('alie', {}),
  'alie_fixed': Case('alie', {'std_factor': 1.5, 'ddof': 1}),
  'fang_krum': Case('fang_krum', {}),
  'fang_trimmed_mean': Case('fang_trimmed_mean', {}, _DRAWS),
  'gaussian': Case('gaussian', {'mean': 0.5, 'std': 2.0}, _DRAWS),
  'ipm': Case('ipm', {'scale': 0.7}),
  'mimic': Case('mimic', {'index': 1}),
  'mimic_farthest': Case('mimic', {'target': 'farthest'}),
  'min_max': Case('min_max', {}),
  'min_max_sign': Case('min_max', {'perturbation': 'sign'}),
  'min_max_unit': Case('min_max', {'perturbation': 'unit'}),
  'min_sum': Case('min_sum', {}),
  'non_finite': Case('non_finite', {}),
  # Keeps the other coordinates of the row.
  'non_finite_one': Case(
    'non_finite',
    {'coordinates': 'one', 'value': 'inf'},
    frozenset({'ignores_own_rows'}),
  ),
  # Leaves everything as it is, which is what it is for.
  'none': Case('none', {}, frozenset({'acts', 'ignores_own_rows'})),
  'optimal_alie': Case('optimal_alie', {'num_evaluations': 8}),
  'optimal_ipm': Case('optimal_ipm', {'num_evaluations': 8}),
  # Sends what it was trained on.
  'optimal_poison': Case(
    'optimal_poison', {'num_evaluations': 8}, frozenset({'ignores_own_rows'})
  ),
  # Takes its norm from the row it replaces.
  'reversal': Case('reversal', {}, frozenset({'ignores_own_rows'})),
  # Multiplies the row it replaces.
  'scaling': Case('scaling', {}, frozenset({'ignores_own_rows'})),
  'sign_flip': Case(
    'sign_flip', {'scale': 3.0}, frozenset({'ignores_own_rows'})
  ),
}
# Write into the malicious row itself, whatever the honest rows hold.
_OWN = {'gaussian', 'non_finite', 'none', 'scaling', 'sign_flip'}


def promising(promise: str):
  """Parametrizes a test over the cases that make a promise."""
  return pytest.mark.parametrize(
    'case', [c for c in CASES if promise not in CASES[c].lacks]
  )


def _attack(case: str):
  """Returns an attack that takes the deltas, the mask and the key alone."""
  name, kwargs, _ = CASES[case]
  attack = attacks.build(name, **kwargs)
  if 'aggregate' not in attacks.inputs(name):
    return attack
  return lambda deltas, mask, key: attack(
    deltas, mask, key, aggregate=aggregators.median
  )


_JITTED = {case: jax.jit(_attack(case)) for case in CASES}


def _deltas(seed: int = 0, dtype=jnp.float32) -> dict:
  """Returns honest deltas: a common direction and some spread."""
  rng = np.random.default_rng(seed)
  return {
    name: jnp.asarray(rng.standard_normal((COHORT, *shape)) + 0.5, dtype)
    for name, shape in (('a', (3, 4)), ('b', (5,)))
  }


def _bits(rows) -> np.ndarray:
  return np.ascontiguousarray(np.asarray(rows)).view(np.uint8)


def _same_bits(left, right):
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(_bits(a), _bits(b)), left, right
  )


def _close(got, want):
  # Sums of 17 squares of 7 rows in float32, in another order: 24 roundings of
  # 6e-8 in values up to 10, the largest gamma here.
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-5),
    got,
    want,
  )


def test_table_covers_the_registry():
  # Those that need more than a tree of deltas have tests of their own.
  special = {n for n in attacks.names() if 'adapter' in attacks.inputs(n)}
  assert special == {'gap'}
  assert {case.name for case in CASES.values()} | special == set(
    attacks.names()
  )


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('case', CASES)
def test_honest_rows_are_bit_identical(case, dtype):
  deltas = _deltas(dtype=dtype)
  attacked = _JITTED[case](deltas, MASK, KEY)
  for name, leaf in deltas.items():
    assert attacked[name].dtype == dtype
    assert attacked[name].shape == leaf.shape
    _same_bits(attacked[name][~MASK], leaf[~MASK])


@promising('acts')
def test_malicious_rows_change(case):
  deltas = _deltas()
  attacked = _JITTED[case](deltas, MASK, KEY)
  assert bool((attacked['a'] != deltas['a'])[MASK, 0, 0].all())


@pytest.mark.parametrize('case', CASES)
def test_jit_equals_no_jit(case):
  deltas = _deltas()['b']
  _close(_JITTED[case](deltas, MASK, KEY), _attack(case)(deltas, MASK, KEY))


@pytest.mark.parametrize('case', CASES)
def test_vmap_equals_a_loop(case):
  runs = [_deltas(seed) for seed in range(3)]
  masks = jnp.stack([MASK, NOBODY, jnp.arange(COHORT) < 3])
  keys = jax.random.split(KEY, 3)
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs)
  got = jax.vmap(_JITTED[case])(stacked, masks, keys)
  for i, run in enumerate(runs):
    want = _JITTED[case](run, masks[i], keys[i])
    _close(jax.tree.map(lambda leaf, i=i: leaf[i], got), want)


@promising('flat')
def test_a_tree_equals_the_flattened_vector(case):
  deltas = _deltas()
  flat = jnp.concatenate([deltas['a'].reshape(COHORT, -1), deltas['b']], 1)
  attacked = _JITTED[case](deltas, MASK, KEY)
  got = jnp.concatenate([attacked['a'].reshape(COHORT, -1), attacked['b']], 1)
  _close(got, _JITTED[case](flat, MASK, KEY))


@pytest.mark.parametrize('case', CASES)
def test_without_malicious_rows_nothing_changes(case):
  deltas = _deltas()
  _same_bits(_JITTED[case](deltas, NOBODY, KEY), deltas)


@pytest.mark.parametrize('case', CASES)
def test_a_key_gives_one_result(case):
  deltas = _deltas()
  once, again = (_JITTED[case](deltas, MASK, KEY) for _ in range(2))
  _same_bits(once, again)
  other = _JITTED[case](deltas, MASK, jax.random.key(4))
  same = np.array_equal(_bits(once['a']), _bits(other['a']))
  assert same == (CASES[case].name not in ('gaussian', 'fang_trimmed_mean'))


@pytest.mark.parametrize('case', CASES)
def test_bf16_is_float32_rounded_once(case):
  """What is written is computed in float32 from the same numbers."""
  small = _deltas(dtype=jnp.bfloat16)
  wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), small)
  attacked = _JITTED[case](small, MASK, KEY)
  if 'aggregate' in attacks.inputs(CASES[case].name):
    # The rule answers in bf16, so that the search may prefer another factor.
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(attacked))
    return
  expected = _JITTED[case](wide, MASK, KEY)
  # A float32 error may tip a rounding: bf16 has steps of 2**-8.
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(
      g.astype(jnp.float32), w, rtol=2**-8, atol=2e-5
    ),
    attacked,
    expected,
  )


@promising('ignores_own_rows')
def test_what_malicious_rows_held_does_not_matter(case):
  deltas = _deltas()
  other = jax.tree.map(lambda leaf: leaf.at[jnp.where(MASK)[0]].set(9), deltas)
  spoiled = jax.tree.map(
    lambda leaf: leaf.at[jnp.where(MASK)[0]].set(jnp.nan), deltas
  )
  want = _JITTED[case](deltas, MASK, KEY)
  _close(_JITTED[case](other, MASK, KEY), want)
  _close(_JITTED[case](spoiled, MASK, KEY), want)


@pytest.mark.parametrize('value', [np.nan, np.inf, 3e38])
@pytest.mark.parametrize(
  'case', [c for c in CASES if CASES[c].name not in _OWN]
)
def test_a_broken_honest_row_is_ignored(case, value):
  """It stays as it is, and the attack is as if aimed at the other rows."""
  deltas = _deltas()
  broken = jax.tree.map(lambda leaf: leaf.at[3].set(value), deltas)
  attacked = _JITTED[case](broken, MASK, KEY)
  jax.tree.map(lambda a, b: _same_bits(a[~MASK], b[~MASK]), attacked, broken)
  rows = jax.tree.map(lambda leaf: leaf[MASK], attacked)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(rows))
  # Nothing of the broken row is in it: another value gives the same.
  other = jax.tree.map(lambda leaf: leaf.at[3].set(-np.inf), deltas)
  again = _JITTED[case](other, MASK, KEY)
  if 'aggregate' not in attacks.inputs(CASES[case].name):
    _close(rows, jax.tree.map(lambda leaf: leaf[MASK], again))


@pytest.mark.parametrize(
  'case', [c for c in CASES if CASES[c].name not in _OWN]
)
def test_with_no_usable_honest_row_nothing_changes(case):
  deltas = _deltas()
  broken = jax.tree.map(
    lambda leaf: leaf.at[jnp.where(~MASK)[0]].set(jnp.nan), deltas
  )
  _same_bits(_JITTED[case](broken, MASK, KEY), broken)
  everyone = jnp.ones(COHORT, bool)
  _same_bits(_JITTED[case](deltas, everyone, KEY), deltas)


@pytest.mark.parametrize('case', [c for c in CASES if c != 'none'])
def test_equal_honest_rows_give_finite_attacks(case):
  """No direction, no spread, no distances: nothing is divided by them."""
  equal = jax.tree.map(lambda leaf: jnp.zeros_like(leaf) + leaf[:1], _deltas())
  for deltas in (equal, jax.tree.map(jnp.zeros_like, equal)):
    attacked = _JITTED[case](deltas, MASK, KEY)
    finite = all(np.isfinite(x).all() for x in jax.tree.leaves(attacked))
    assert finite == (CASES[case].name != 'non_finite')


@pytest.mark.parametrize('scale', [1e-8, 1e8])
@pytest.mark.parametrize(
  'case',
  [
    c
    for c in CASES
    # Noise has a size of its own; NaN is no multiple of anything.
    if CASES[c].name not in ('gaussian', 'non_finite')
  ],
)
def test_attacks_scale_with_the_deltas(case, scale):
  scaled = jax.tree.map(lambda leaf: scale * leaf, _deltas())
  got = _JITTED[case](scaled, MASK, KEY)
  want = _JITTED[case](_deltas(), MASK, KEY)
  _close(jax.tree.map(lambda leaf: leaf / scale, got), want)
