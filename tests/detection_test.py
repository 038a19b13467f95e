"""Detection metrics against their definitions, by counting."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_safety import detection


def _counted(scores, malicious, threshold):
  """Returns the metrics by going through clients and pairs one by one."""
  flagged = [s >= threshold for s in scores]
  clients = list(zip(flagged, malicious, strict=True))
  caught = sum(f and m for f, m in clients)
  wrong = sum(f and not m for f, m in clients)
  bad, good = sum(malicious), len(malicious) - sum(malicious)
  wins = [
    1.0 if a > b else 0.5 if a == b else 0.0
    for (a, is_bad), (b, also_bad) in itertools.product(
      list(zip(scores, malicious, strict=True)), repeat=2
    )
    if is_bad and not also_bad
  ]
  return {
    'detection_auroc': sum(wins) / len(wins) if wins else math.nan,
    'detection_precision': caught / sum(flagged) if any(flagged) else math.nan,
    'detection_recall': caught / bad if bad else math.nan,
    'false_positive_rate': wrong / good if good else math.nan,
  }


def _same(got, want):
  assert set(got) == set(want) == set(detection.NAMES)
  for name, value in want.items():
    assert got[name].dtype == jnp.float32
    np.testing.assert_allclose(got[name], value, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize('seed', range(20))
def test_equals_counting(seed):
  rng = np.random.default_rng(seed)
  scores = rng.integers(0, 4, 8).astype(np.float32)  # Many ties.
  malicious = rng.random(8) < rng.choice([0.0, 0.3, 0.7, 1.0])
  got = _jitted(scores, malicious, 2.0)
  _same(got, _counted(scores.tolist(), malicious.tolist(), 2.0))


_jitted = jax.jit(
  lambda scores, malicious, threshold: detection.from_scores(
    scores, malicious, threshold=threshold
  )
)


def test_weight_zero_is_a_rejection_and_low_weights_are_suspicious():
  weights = jnp.array([0.5, 0.0, 0.4, 0.1, 0.0])
  malicious = jnp.array([False, False, False, True, True])
  found = detection.from_weights(weights, malicious)
  _same(found, _counted((-weights).tolist(), malicious.tolist(), 0.0))
  assert float(found['detection_precision']) == 0.5
  assert float(found['detection_recall']) == 0.5
  assert float(found['false_positive_rate']) == pytest.approx(1 / 3)
  # Of six pairs, the honest client without weight wins one and ties one.
  assert float(found['detection_auroc']) == pytest.approx(4.5 / 6)
  found = detection.from_weights(weights, malicious, threshold=0.1)
  assert float(found['detection_recall']) == 1


@pytest.mark.parametrize(
  ('malicious', 'weights', 'undefined'),
  [
    ([False, False], [0.0, 1.0], {'detection_auroc', 'detection_recall'}),
    ([True, True], [0.0, 1.0], {'detection_auroc', 'false_positive_rate'}),
    ([True, False], [0.5, 0.5], {'detection_precision'}),
  ],
)
def test_a_share_of_nobody_is_nan(malicious, weights, undefined):
  found = detection.from_weights(jnp.array(weights), jnp.array(malicious))
  assert {name for name, x in found.items() if np.isnan(x)} == undefined


def test_perfect_reversed_and_ignorant_scores():
  malicious = jnp.array([True, True, False, False, False])
  rank = jnp.array([9.0, 8.0, 1.0, 2.0, 3.0])
  assert float(detection.auroc(rank, malicious)) == 1
  assert float(detection.auroc(-rank, malicious)) == 0
  assert float(detection.auroc(jnp.zeros(5), malicious)) == 0.5


def test_a_score_that_is_nan_is_the_most_suspicious():
  scores = jnp.array([jnp.nan, 5.0, 1.0])
  malicious = jnp.array([True, False, False])
  found = detection.from_scores(scores, malicious, threshold=6.0)
  assert float(found['detection_auroc']) == 1
  assert float(found['detection_recall']) == 1
  assert float(found['false_positive_rate']) == 0


def test_vmap_equals_a_loop():
  rng = np.random.default_rng(0)
  weights = jnp.asarray(rng.integers(0, 3, (4, 6)), jnp.float32)
  malicious = jnp.asarray(rng.random((4, 6)) < 0.5)
  got = jax.jit(jax.vmap(detection.from_weights))(weights, malicious)
  for i in range(4):
    want = _jitted(-weights[i], malicious[i], 0.0)
    jax.tree.map(
      np.testing.assert_array_equal, {k: v[i] for k, v in got.items()}, want
    )
