"""DeepSight's scores against a slow definition written from its paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_safety import aggregators


def slow_energies(layer):
  """`layer` is [C, outputs] sums of magnitudes."""
  return layer**2 / (layer**2).sum(axis=1, keepdims=True)


def test_deepsight_scores_match_their_definition():
  rng = np.random.default_rng(0)
  kernel = rng.standard_normal((7, 5, 30)).astype(np.float32)
  kernel[0, :, 2] *= 40  # one label
  bias = rng.standard_normal((7, 30)).astype(np.float32)
  deltas = {'body': bias[:, :4], 'head': {'kernel': kernel, 'bias': bias}}
  got = aggregators.deepsight_scores(deltas, output_layer='head')
  energy = np.abs(kernel.astype(np.float64)).sum(axis=1) + np.abs(bias)
  want = slow_energies(energy)
  np.testing.assert_allclose(got.energies, want, rtol=0, atol=1e-6)
  threshold = max(0.01, 1 / 30) * want.max(axis=1, keepdims=True)
  exceedings = (want > threshold).sum(axis=1)
  np.testing.assert_array_equal(got.exceedings, exceedings)
  suspicious = exceedings <= np.median(exceedings) / 2
  np.testing.assert_array_equal(got.is_suspicious, suspicious)
  assert list(np.flatnonzero(suspicious)) == [0]


@pytest.mark.parametrize('scale', [1e-18, 1e18])
def test_deepsight_scores_do_not_depend_on_the_unit(scale):
  rows = np.random.default_rng(1).standard_normal((5, 9)).astype(np.float32)
  rows[2, 3] = np.nan
  want = aggregators.deepsight_scores({'b': rows}, output_layer='b')
  big = {'b': rows * np.float32(scale)}
  got = jax.jit(lambda x: aggregators.deepsight_scores(x, output_layer='b'))(
    big
  )
  np.testing.assert_allclose(got.energies, want.energies, atol=1e-6)
  np.testing.assert_array_equal(got.exceedings, want.exceedings)
  assert got.is_suspicious[2] and not got.energies[2].any()


@pytest.mark.parametrize(
  ('path', 'message'),
  [
    ('heat', r"did you mean 'head/a'\?|leaves: body, head/a, head/b"),
    ('head', 'one number of outputs'),
  ],
)
def test_deepsight_names_what_it_cannot_find(path, message):
  deltas = {
    'body': jnp.ones((3, 2)),
    'head': {'a': jnp.ones((3, 2, 4)), 'b': jnp.ones((3, 4, 5))},
  }
  with pytest.raises(ValueError, match=message):
    aggregators.deepsight_scores(deltas, output_layer=path)
