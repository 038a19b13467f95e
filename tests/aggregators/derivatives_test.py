"""Rules have the derivatives of what they compute, and no NaN in them."""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_safety import aggregators
from fedjax_safety.aggregators import _rule

_SPEC = importlib.util.spec_from_file_location(
  'contract', pathlib.Path(__file__).with_name('contract_test.py')
)
contract = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(contract)

# Its filter is a loop of unknown length, which has no derivative in reverse.
CASES = [case for case in contract.CASES if case != 'caf']
# FoolsGold bends within a thousandth of these rows.
STEP = 3e-4


def _rows(seed: int) -> np.ndarray:
  """Returns [C, 6] rows."""
  rng = np.random.default_rng(seed)
  return (rng.standard_normal((contract.COHORT, 6)) + 0.5).astype(np.float32)


@functools.cache
def _both(case: str):
  """Returns a jitted function of rows: a number made of the delta, and slopes.

  The number bends, so that its slope differs from coordinate to coordinate.
  """
  update = contract._plain_update(case)

  def number(rows):
    return jnp.sum(jnp.sin(update(rows).delta))

  return jax.jit(jax.value_and_grad(number))


@pytest.mark.parametrize('case', CASES)
def test_the_derivative_is_the_slope(case):
  rows, direction = _rows(0), _rows(1)
  _, slopes = _both(case)(rows)
  high, low = (
    float(_both(case)(rows + np.float32(step) * direction)[0])
    for step in (STEP, -STEP)
  )
  # A dozen roundings of numbers of size 1, over the step.
  np.testing.assert_allclose(
    np.vdot(slopes, direction), (high - low) / (2 * STEP), rtol=0, atol=5e-3
  )


@pytest.mark.parametrize('kind', ['one row of zeros', 'zeros', 'equal rows'])
@pytest.mark.parametrize('case', CASES)
def test_the_derivative_is_finite_where_norms_and_spreads_are_zero(case, kind):
  rows = _rows(2)
  if kind == 'equal rows':
    rows[:] = rows[0]
  else:
    rows[2 if kind == 'one row of zeros' else slice(None)] = 0
  assert np.isfinite(_both(case)(rows)[1]).all()


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('case', CASES)
def test_a_row_that_is_not_finite_has_a_derivative_of_zero(case, value):
  rows = _rows(2)
  rows[2] = value
  number, slopes = _both(case)(rows)
  assert np.isfinite(number)
  assert np.isfinite(slopes).all()
  assert not slopes[2].any()
  assert slopes.any() != (case == 'sign_majority')


@pytest.mark.parametrize('value', [np.nan, np.inf])
@pytest.mark.parametrize('case', CASES)
def test_one_bad_entry_leaves_all_derivatives_finite(case, value):
  rows = _rows(2)
  rows[2, 3] = value
  _, slopes = _both(case)(rows)
  assert np.isfinite(slopes).all()
  assert slopes[2, 3] == 0
  if _rule.REGISTRY[contract.CASES[case].name].kind == 'affine':
    assert not slopes[2].any()


@pytest.mark.parametrize('num_columns', [6, 5_000])
def test_rows_that_are_made_of_rows_have_derivatives_beside_bad_ones(
  num_columns,
):
  rows = np.random.default_rng(3).standard_normal((7, num_columns))
  rows /= np.linalg.norm(rows, axis=1, keepdims=True)
  rows = np.float32(rows * np.arange(1, 8)[:, None])
  rows[2, 3] = np.nan

  @jax.jit
  @jax.grad
  def slopes_of(rows):
    # Row 6, and the one that is not finite, are clipped to the norm of row 5.
    made = aggregators.adaptive_clipping(rows, num_byzantine=2)
    return jnp.sum(made[6, :2]) + made[0, 3]

  slopes = slopes_of(rows)
  sizes = np.linalg.norm(rows, axis=1)
  want = np.zeros_like(rows)
  want[0, 3] = 1
  want[5] = rows[6, :2].sum() / sizes[6] * rows[5] / sizes[5]
  want[6, :2] = sizes[5] / sizes[6]
  want[6] -= rows[6, :2].sum() * sizes[5] / sizes[6] ** 3 * rows[6]
  np.testing.assert_allclose(slopes, want, rtol=0, atol=1e-5)
