"""Each attack against a slow version written from its definition."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_safety import aggregators, attacks

pytestmark = pytest.mark.usefixtures('quick_compiles')

_SPEC = importlib.util.spec_from_file_location(
  'attack_reference', pathlib.Path(__file__).with_name('attack_reference.py')
)
reference = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(reference)

KEY = jax.random.key(5)
WIDTH = 6
# Clients and malicious ones; the last malicious, then mixed in.
SIZES = [(7, 2), (9, 1), (11, 4)]


def _round(n, f, seed=0):
  """Returns the deltas, the mask and the honest rows in float64."""
  rng = np.random.default_rng(seed)
  deltas = rng.standard_normal((n, WIDTH)) + rng.normal(0, 1, WIDTH)
  deltas = np.float32(deltas)
  mask = np.zeros(n, bool)
  mask[rng.permutation(n)[:f]] = True
  return jnp.asarray(deltas), jnp.asarray(mask), np.float64(deltas[~mask])


def _row(name, deltas, mask, **kwargs):
  """Returns what the malicious clients send, which is one row."""
  attacked = np.asarray(_jitted(name, **kwargs)(deltas, mask, KEY))[mask]
  np.testing.assert_array_equal(attacked, attacked[:1].repeat(len(attacked), 0))
  return attacked[0]


def _jitted(name, aggregate=None, **kwargs):
  attack = attacks.build(name, **kwargs)
  if aggregate is None:
    return jax.jit(attack)
  return jax.jit(lambda *given: attack(*given, aggregate=aggregate))


def _close(got, want):
  # Roots of differences of sums of six squares up to 20, in float32: 1e-5.
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(('n', 'f'), SIZES)
def test_rows_equal_their_definitions(n, f):
  deltas, mask, honest = _round(n, f)
  mean = honest.mean(axis=0)
  _close(_row('ipm', deltas, mask, scale=0.7), -0.7 * mean)
  for ddof in (0, 1):
    want = reference.alie(honest, n, f, ddof)
    _close(_row('alie', deltas, mask, ddof=ddof), want)
  want = mean - 1.5 * honest.std(axis=0)
  _close(_row('alie', deltas, mask, std_factor=1.5), want)
  want = reference.mimic_farthest(honest)
  np.testing.assert_array_equal(
    _row('mimic', deltas, mask, target='farthest'), np.float32(want)
  )


@pytest.mark.parametrize('kind', ['unit', 'sign', 'std'])
@pytest.mark.parametrize('name', ['min_max', 'min_sum'])
def test_min_max_and_min_sum_go_as_far_as_they_may(name, kind):
  for seed, (n, f) in enumerate(SIZES):
    deltas, mask, honest = _round(n, f, seed)
    want = getattr(reference, name)(honest, kind)
    got = _row(name, deltas, mask, perturbation=kind)
    _close(got, want)


def test_alie_beyond_the_quantiles_stays_finite():
  # Two clients need one supporter of one: the quantile of 0 is -inf.
  for n, f in ((2, 1), (5, 4), (3, 2)):
    deltas, mask, _ = _round(n, f)
    assert np.isfinite(_row('alie', deltas, mask)).all()


@pytest.mark.parametrize('index', [0, 2, 50])
def test_mimic_copies_the_honest_row_of_that_number(index):
  deltas, mask, honest = _round(7, 2)
  want = honest[min(index, len(honest) - 1)]
  np.testing.assert_array_equal(
    _row('mimic', deltas, mask, index=index), np.float32(want)
  )
  broken = deltas.at[np.flatnonzero(~mask)[0]].set(jnp.nan)
  want = honest[min(index + 1, len(honest) - 1)]
  np.testing.assert_array_equal(
    _row('mimic', broken, mask, index=index), np.float32(want)
  )


def test_reversal_keeps_the_norms_and_turns_the_mean():
  deltas, mask, honest = _round(7, 2)
  attacked = np.asarray(_jitted('reversal', scale=2.0)(deltas, mask, KEY))
  own = np.linalg.norm(deltas[mask], axis=1)
  unit = honest.mean(axis=0) / np.linalg.norm(honest.mean(axis=0))
  _close(attacked[mask], -2 * own[:, None] * unit)
  broken = deltas.at[np.flatnonzero(mask)[0], 0].set(jnp.inf)
  attacked = np.asarray(_jitted('reversal')(broken, mask, KEY))
  _close(attacked[mask][0], -honest.mean(axis=0))


def test_scaling_by_default_replaces_the_mean_by_that_of_malicious_rows():
  deltas, mask, _ = _round(8, 2)
  deltas = jnp.where(mask[:, None], deltas, 0.0)
  attacked = jax.jit(attacks.scaling)(deltas, mask, KEY)
  _close(attacked.mean(axis=0), np.asarray(deltas[mask]).mean(axis=0))
  attacked = attacks.scaling(deltas, mask, KEY, factor=3.0)
  np.testing.assert_array_equal(attacked[mask], 3 * deltas[mask])


@pytest.mark.parametrize('spread', [1.0, 3.0])
def test_fang_trimmed_mean_draws_from_its_interval(spread):
  for seed in range(3):
    deltas, mask, _ = _round(9, 3, seed)
    # Coordinates whose honest values all lie on one side of 0, too.
    deltas = deltas.at[:, 0].add(9.0).at[:, 1].add(-9.0)
    honest = np.float64(deltas[~mask])
    attack = _jitted('fang_trimmed_mean', spread=spread)
    rows = np.asarray(attack(deltas, mask, KEY))[mask]
    low, high = reference.fang_interval(honest, spread)
    size = 1e-6 * np.abs(honest).max() * spread
    assert (rows >= low - size).all() and (rows <= high + size).all()
    beyond = (rows >= honest.max(0) - size) | (rows <= honest.min(0) + size)
    assert beyond.all()
    if spread > 1:
      assert len(np.unique(rows, axis=0)) == len(rows)


def test_fang_trimmed_mean_is_uniform_there():
  deltas = jnp.tile(jnp.array([[-1.0], [-3.0], [0.0]]), (1, 20_000))
  mask = jnp.array([False, False, True])
  draws = np.asarray(_jitted('fang_trimmed_mean')(deltas, mask, KEY))[2]
  # From -1 to -0.5: mean -0.75, and a standard error of 0.001.
  assert -1 <= draws.min() < -0.999 and -0.501 < draws.max() <= -0.5
  assert draws.mean() == pytest.approx(-0.75, abs=0.005)


@pytest.mark.parametrize(('n', 'f'), SIZES)
def test_fang_krum_equals_its_definition(n, f):
  attack = _jitted('fang_krum')
  for seed in range(4):
    deltas, mask, honest = _round(n, f, seed)
    got = np.asarray(attack(deltas, mask, KEY))[mask]
    _close(got, np.tile(reference.fang_krum(honest, n, f), (f, 1)))


def test_fang_krum_is_selected_by_krum():
  deltas, mask, _ = _round(11, 4)
  # A server that assumes fewer sums more neighbors, so the step is shorter.
  steps = []
  for assumed in (4, 3):
    krum = jax.jit(aggregators.krum(num_byzantine=assumed))
    attack = _jitted('fang_krum', num_byzantine=assumed)
    attacked = attack(deltas, mask, KEY)
    np.testing.assert_array_equal(krum(attacked), attacked[mask][0])
    steps.append(float(jnp.abs(attacked[mask]).max()))
  assert steps[1] <= steps[0]


_RULES = {
  'mean': (aggregators.mean, lambda rows: rows.mean(axis=0)),
  'median': (aggregators.median, lambda rows: np.median(rows, axis=0)),
  'krum': (
    aggregators.krum(num_byzantine=2),
    lambda rows: rows[reference.krum_choice(rows, 2)],
  ),
}


@pytest.mark.parametrize('rule', _RULES)
@pytest.mark.parametrize('name', ['optimal_ipm', 'optimal_alie'])
def test_optimal_attacks_equal_their_search(name, rule):
  aggregate, slow = _RULES[rule]
  for seed in range(3):
    rng = np.random.default_rng(seed)
    deltas = rng.standard_normal((8, WIDTH)).astype(np.float32) + 0.5
    mask = np.arange(8) >= 6
    honest = np.float64(deltas[:6])
    mean, std = honest.mean(axis=0), honest.std(axis=0)
    row = {
      'optimal_ipm': lambda factor, mean=mean: -factor * mean,
      'optimal_alie': lambda z, mean=mean, std=std: mean - z * std,
    }[name]
    # A median stops moving once the attack is beyond its neighbors: steps
    # then differ by less than float32 tells, hence the start at a short one.
    want = reference.optimal(honest, 2, row, slow, 6, 0.25)
    got = _row(
      name,
      jnp.asarray(deltas),
      jnp.asarray(mask),
      aggregate=aggregate,
      num_evaluations=6,
      first_step=0.25,
    )
    _close(got, want)


def test_optimal_attacks_hurt_at_least_as_much_as_a_fixed_one():
  deltas, mask, honest = _round(9, 2)

  def damage(attacked):
    return np.linalg.norm(aggregators.median(attacked) - honest.mean(axis=0))

  for optimal, fixed, kwargs in (
    ('optimal_ipm', 'ipm', {'scale': 0.1}),
    ('optimal_alie', 'alie', {}),
  ):
    best = _jitted(optimal, aggregate=aggregators.median)(deltas, mask, KEY)
    other = _jitted(fixed, **kwargs)(deltas, mask, KEY)
    assert damage(best) >= damage(other) - 1e-6


@pytest.mark.parametrize('rule', _RULES)
def test_optimal_poison_brings_the_output_as_near_as_the_rule_lets(rule):
  deltas, mask, honest = _round(9, 2)
  aggregate = _RULES[rule][0]
  mean = honest.mean(axis=0)
  own = np.asarray(deltas[mask]).mean(axis=0)
  way = own - mean
  row = _row('optimal_poison', deltas, mask, aggregate=aggregate)
  factor = (row - mean) @ way / (way @ way)
  _close(row, mean + factor * way)

  def missed(factor):
    sent = jnp.where(mask[:, None], mean + factor * way, deltas)
    return np.linalg.norm(aggregate(sent) - own)

  tried = [missed(f) for f in (0.0, 0.25, 0.5, 1.0, 2.0, 4.5, 8.0)]
  # Twenty factors of a line find the best one to a fiftieth of the way.
  assert missed(factor) <= min(tried) + 0.02 * np.linalg.norm(way)


def test_optimal_poison_replaces_a_plain_mean():
  deltas, mask, _ = _round(10, 4)
  found = _jitted(
    'optimal_poison', aggregate=aggregators.mean, num_evaluations=40
  )(deltas, mask, KEY)
  np.testing.assert_allclose(
    aggregators.mean(found), deltas[mask].mean(axis=0), atol=1e-3
  )


def test_a_rule_that_breaks_leaves_the_search_finite():
  deltas, mask, _ = _round(7, 2)

  def breaks(rows):
    return jnp.where(jnp.abs(rows).max() > 20, jnp.nan, rows.mean(axis=0))

  row = _row('optimal_ipm', deltas, mask, aggregate=breaks)
  assert np.isfinite(row).all() and np.abs(row).max() <= 20


def test_non_finite_in_one_coordinate_keeps_the_rest():
  deltas = {'a': jnp.ones((5, 2, 3)), 'b': jnp.ones((5, 4))}
  mask = jnp.array([False, True, False, False, True])
  attacked = attacks.non_finite(deltas, mask, KEY, coordinates='one')
  bad = np.isnan(attacked['a'])
  assert bad[mask, 0, 0].all() and bad.sum() == 2
  assert not np.isnan(attacked['b']).any()


def test_inputs_name_what_an_attack_needs_of_the_round():
  adaptive = {n for n in attacks.names() if 'aggregate' in attacks.inputs(n)}
  assert adaptive == {'optimal_alie', 'optimal_ipm', 'optimal_poison'}
  assert attacks.inputs('gap') == {'adapter'}
  assert attacks.inputs('optimal_ipm') == {'aggregate'}
  with pytest.raises(ValueError, match='known: alie'):
    attacks.inputs('unheard_of')
