"""What rules hold in memory at once, and how often they go through it."""

import functools

import jax
import jax.numpy as jnp
import pytest

from fedjax_safety import aggregators
from fedjax_safety.plan import traffic

# Tiles of columns and a rest.
ROWS = jax.ShapeDtypeStruct((10, 200_000), jnp.float32)
ROW = 4 * ROWS.shape[1]
KEY = jax.random.key(0)


@pytest.fixture(autouse=True, scope='module')
def _full_compiles(_quick_compiles):
  """Compiles with all optimizations, as users do."""
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  jax.config.update('jax_disable_most_optimizations', True)


@functools.cache
def _compiled(rule):
  return jax.jit(rule).lower(ROWS).compile()


def _krum(rows):
  return aggregators.krum(rows, num_byzantine=2)


# Those that make rows, or look at values in several ways. Neighbors of all
# rows would be nine copies of them, signs and ranks of all values four.
@pytest.mark.parametrize(
  ('name', 'kwargs'),
  [
    ('alignins', {}),
    ('lasa', {}),
    ('nearest_neighbor_mixing', {'num_byzantine': 2}),
    ('residual_reweighting', {}),
    ('signguard', {'key': KEY}),
  ],
)
def test_one_copy_of_the_rows_is_the_most_that_a_rule_holds(name, kwargs):
  rule = functools.partial(getattr(aggregators, name), **kwargs)
  needed = _compiled(rule).memory_analysis()
  held = needed.temp_size_in_bytes + needed.output_size_in_bytes
  # What is returned is part of it. A row and a few tiles come on top.
  assert held <= 4 * ROWS.size + 2 * ROW


def test_steps_before_a_rule_do_not_touch_the_rows():
  chain = aggregators.chain(
    aggregators.adaptive_clipping(num_byzantine=2),
    aggregators.nearest_neighbor_mixing(num_byzantine=2),
    aggregators.krum(num_byzantine=2),
  )
  alone = traffic.read(_compiled(_krum).as_text()).memory
  # Not one of them is read or written once more.
  assert traffic.read(_compiled(chain).as_text()).memory < alone + ROW


def test_a_rule_that_reads_the_rows_once_more_is_told():
  def twice(rows):
    return _krum(rows) + jnp.sort(rows, axis=0)[3]

  alone = traffic.read(_compiled(_krum).as_text()).memory
  assert traffic.read(_compiled(twice).as_text()).memory > alone + 4 * ROWS.size
