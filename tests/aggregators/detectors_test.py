"""FLDetector against a slow definition written from its paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_safety import aggregators
from fedjax_safety.aggregators import _detectors

# Errors of a quasi-Newton step in float32, relative to the step.
TOLERANCE = 1e-4
COHORT, SIZE, WINDOW = 8, 12, 3


def _clients(seed, cohort_size=COHORT):
  """Returns the deltas of honest clients as a function of the model.

  Each takes a step down a quadratic of its own, so that its deltas are
  linear in the model and can be predicted.
  """
  rng = np.random.default_rng(seed)
  root = rng.standard_normal((SIZE, SIZE))
  curvature = np.eye(SIZE) + root @ root.T / SIZE
  centers = rng.standard_normal(SIZE) + 0.1 * rng.standard_normal(
    (cohort_size, SIZE)
  )

  def deltas(model):
    return -0.2 * (model - centers) @ curvature

  return deltas


def slow_hessian_product(moves, changes, last):
  """The product with the last move, by dense BFGS updates in order."""
  scale = changes[-1] @ moves[-1] / (moves[-1] @ moves[-1])
  hessian = scale * np.eye(len(last))
  for s, y in zip(moves, changes, strict=True):
    bs = hessian @ s
    hessian = hessian - np.outer(bs, bs) / (s @ bs) + np.outer(y, y) / (y @ s)
  return hessian @ last


def slow_two_means(values):
  """Returns the best split's squared deviations and the higher group."""
  order = np.argsort(values, kind='stable')
  best = (np.inf, None)
  for cut in range(1, len(values)):
    groups = values[order[:cut]], values[order[cut:]]
    spread = sum(((g - g.mean()) ** 2).sum() for g in groups)
    best = min(best, (spread, cut), key=lambda pair: pair[0])
  return best[0], order[best[1] :]


def slow_malicious(scores, samples):
  """The gap statistic between one and two means, and the higher of two."""
  scaled = (scores - scores.min()) / (scores.max() - scores.min())

  def spreads(values):
    return ((values - values.mean()) ** 2).sum(), slow_two_means(values)[0]

  found, higher = spreads(scaled), slow_two_means(scaled)[1]
  drawn = np.array([spreads(sample) for sample in samples])
  gaps = [np.log(drawn[:, k].mean()) - np.log(found[k]) for k in (0, 1)]
  error = np.sqrt(1 + 1 / len(samples)) * np.log(drawn[:, 1]).std()
  return set(higher) if gaps[0] < gaps[1] - error else set()


def slow_fldetector(update_rows, num_rounds):
  """Returns each round's clients kept, from the definition.

  Args:
    update_rows: `(round, model) -> [C, P]`, what clients send.
    num_rounds: rounds to play.
  """
  samples = _detectors._uniform_samples(COHORT).astype(np.float64)
  model, history, models, means, scores = np.zeros(SIZE), [], [], [], []
  kept_by_round = []
  for t in range(num_rounds):
    rows = update_rows(t, model)
    models.append(model)
    if t >= 2:
      moves = [models[k] - models[k - 1] for k in range(1, t)][-WINDOW:]
      changes = [means[k] - means[k - 1] for k in range(1, t)][-WINDOW:]
      last = models[t] - models[t - 1]
      step = slow_hessian_product(moves, changes, last)
      errors = np.linalg.norm(history[-1] + step - rows, axis=1)
      scores.append(errors / errors.sum())
    kept = set(range(COHORT))
    if len(scores) >= WINDOW:
      kept -= slow_malicious(np.mean(scores[-WINDOW:], axis=0), samples)
    delta = rows[sorted(kept)].mean(axis=0)
    history.append(rows)
    means.append(delta)
    model = model + delta
    kept_by_round.append(kept)
  return kept_by_round, scores, model


def _play(update_rows, num_rounds):
  """Runs the rule on the same clients; returns what it kept and scored."""
  rule = aggregators.build('fldetector', cohort_size=COHORT, window=WINDOW)
  state, update = rule.init(jnp.zeros(SIZE)), jax.jit(rule.update)
  model, kept, scores = np.zeros(SIZE), [], []
  for t in range(num_rounds):
    rows = jnp.asarray(update_rows(t, model), jnp.float32)
    output = update(rows, state, weights=None, key=None)
    state, model = output.state, model + np.asarray(output.delta, np.float64)
    kept.append(set(np.flatnonzero(output.client_weights)))
    scores.append(np.asarray(state.scores[t % WINDOW]))
  return kept, scores, model


def _inconsistent(seed, num_malicious=2):
  """Returns clients of which the first send another direction each round."""
  honest = _clients(seed)

  def update_rows(t, model):
    rows = honest(model)
    rng = np.random.default_rng((seed, t))
    rows[:num_malicious] += rng.standard_normal((num_malicious, SIZE))
    return rows + 1e-3 * rng.standard_normal(rows.shape)

  return update_rows


@pytest.mark.parametrize('seed', range(3))
def test_fldetector_matches_its_definition(seed):
  clients = _inconsistent(seed)
  want_kept, want_scores, want_model = slow_fldetector(clients, 8)
  kept, scores, model = _play(clients, 8)
  assert kept == want_kept
  for got, want in zip(scores[2:], want_scores, strict=True):
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)
  np.testing.assert_allclose(model, want_model, rtol=0, atol=TOLERANCE)


def test_fldetector_finds_inconsistent_clients_and_nobody_else():
  kept, _, _ = _play(_inconsistent(0), 8)
  everyone = set(range(COHORT))
  # No scores before the third round, and as many as the window by the fifth.
  assert kept[:4] == [everyone] * 4
  assert kept[5:] == [everyone - {0, 1}] * 3
  kept, _, _ = _play(_inconsistent(0, num_malicious=0), 8)
  assert kept == [everyone] * 8


def test_fldetector_suspects_rows_that_are_not_finite():
  clients = _inconsistent(0, num_malicious=0)

  def update_rows(t, model):
    rows = clients(t, model)
    rows[3, 2] = np.nan if t in (2, 5) else rows[3, 2]
    return rows

  kept, scores, model = _play(update_rows, 7)
  assert 3 not in kept[2] and 3 not in kept[5]
  assert np.isfinite(model).all()
  for t in (2, 5):
    assert scores[t][3] == scores[t].max()


def test_fldetector_survives_rounds_without_news():
  rows = np.tile(_clients(0)(np.zeros(SIZE))[:1], (COHORT, 1))
  kept, scores, model = _play(lambda t, model: rows, 8)
  assert kept == [set(range(COHORT))] * 8
  np.testing.assert_allclose(model, 8 * rows[0], rtol=1e-5)
  assert np.isfinite(scores).all()


@pytest.mark.parametrize('scale', [1e-6, 1e6])
def test_fldetector_does_not_depend_on_the_unit(scale):
  clients = _inconsistent(1)

  def scaled(t, model):
    return scale * clients(t, model / scale)

  assert _play(scaled, 7)[0] == _play(clients, 7)[0]


def test_fldetector_gives_its_scores():
  rows = jnp.asarray(_clients(0)(np.zeros(SIZE)))

  def metrics(*preaggregators):
    rule = aggregators.build(
      'fldetector', cohort_size=COHORT, preaggregators=preaggregators
    )
    key = jax.random.key(0)
    state = rule.init(rows[0])
    return rule.update(rows, state, weights=None, key=key).metrics

  assert metrics()['client_scores'].shape == (COHORT,)
  # Buckets of clients are no clients.
  assert 'client_scores' not in metrics({'name': 'bucketing', 'bucket_size': 2})


def test_build_refuses():
  with pytest.raises(ValueError, match='window=0'):
    aggregators.build('fldetector', cohort_size=5, window=0)
  with pytest.raises(ValueError, match='cohort_size=2'):
    aggregators.build('fldetector', cohort_size=2)
