"""FoolsGold with a history, against its definition over rounds."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_safety import aggregators

_SPEC = importlib.util.spec_from_file_location(
  'numpy_reference', pathlib.Path(__file__).with_name('numpy_reference.py')
)
reference = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(reference)

COHORT = 7


def _rounds(num_rounds=4, bad=()):
  """Returns rounds of [C, 13] rows; rows 1, 4 and 5 share a goal."""
  rng = np.random.default_rng(0)
  rounds = []
  for t in range(num_rounds):
    rows = rng.standard_normal((COHORT, 13)) + 0.3
    rows[[1, 4, 5]] += 2 * np.linspace(-1, 1, 13)
    if t in bad:
      rows[2, 3] = np.nan
    rounds.append(rows.astype(np.float32))
  return rounds


def slow_history(rounds, variant):
  history, deltas = np.zeros((COHORT, 13)), []
  for rows in rounds:
    rows = rows.astype(np.float64)
    finite = np.isfinite(rows).all(axis=1)
    history[finite] += rows[finite]
    rates = reference.foolsgold_rates(history[finite])
    total = rates @ rows[finite]
    if variant == 'openfedllm':
      total = total / np.count_nonzero(rates)
    deltas.append(total)
  return deltas


@pytest.mark.parametrize('bad', [(), (0, 2)])
@pytest.mark.parametrize('variant', ['paper', 'openfedllm'])
def test_matches_the_definition_over_rounds(variant, bad):
  rounds = _rounds(bad=bad)
  rule = aggregators.build(
    'foolsgold_history', cohort_size=COHORT, variant=variant
  )
  state, update = rule.init(jnp.zeros(13)), jax.jit(rule.update)
  for rows, want in zip(rounds, slow_history(rounds, variant), strict=True):
    output = update(rows, state, weights=None, key=None)
    state = output.state
    # The logarithm of 1 minus a cosine magnifies its rounding.
    np.testing.assert_allclose(output.delta, want, rtol=0, atol=2e-4)


def test_the_first_round_is_foolsgold():
  (rows,) = _rounds(1)
  np.testing.assert_allclose(
    aggregators.foolsgold_history(rows), aggregators.foolsgold(rows), atol=1e-5
  )


def test_history_tells_sybils_that_one_round_does_not():
  rng = np.random.default_rng(3)
  goal = np.linspace(-1, 1, 200)
  rule = aggregators.build('foolsgold_history', cohort_size=COHORT)
  state, update = rule.init(jnp.zeros(200)), jax.jit(rule.update)
  shares = []
  for _ in range(12):
    rows = rng.standard_normal((COHORT, 200))
    rows[:3] += goal
    output = update(
      jnp.asarray(rows, jnp.float32), state, weights=None, key=None
    )
    state = output.state
    shares.append(float(output.client_weights[:3].sum()))
  assert shares[-1] < 0.05 < shares[0]
  # Without the history the last round looks like the first.
  alone = aggregators.build('foolsgold', cohort_size=COHORT)
  last = alone.update(
    jnp.asarray(rows, jnp.float32), (), weights=None, key=None
  )
  assert float(last.client_weights[:3].sum()) > 0.05


def test_history_is_float32_whatever_the_deltas():
  rule = aggregators.build('foolsgold_history', cohort_size=COHORT)
  rows = jnp.ones((COHORT, 3), jnp.bfloat16)
  state = rule.init(rows[0])
  output = rule.update(rows, state, weights=None, key=None)
  assert output.state.dtype == jnp.float32
  assert output.delta.dtype == jnp.bfloat16
