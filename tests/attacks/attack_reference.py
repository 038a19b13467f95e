"""Slow NumPy versions of the attacks in float64, from their definitions.

`honest` is a matrix of the honest rows alone; `n` clients, `f` malicious. Each
returns the row that malicious clients send.
"""

import statistics

import numpy as np


def alie(honest, n, f, ddof=0):
  supporters = int(np.floor(n / 2 + 1)) - f
  quantile = (n - f - supporters) / (n - f)
  z = statistics.NormalDist().inv_cdf(quantile)
  return honest.mean(axis=0) - z * honest.std(axis=0, ddof=ddof)


def _perturbation(honest, kind):
  mean = honest.mean(axis=0)
  if kind == 'unit':
    return mean / np.linalg.norm(mean)
  return np.sign(mean) if kind == 'sign' else honest.std(axis=0)


def _largest(fits):
  """Bisects for the largest gamma >= 0 that fits."""
  high = 1.0
  while fits(high):
    high *= 2
  low = 0.0
  for _ in range(60):
    middle = 0.5 * (low + high)
    low, high = (middle, high) if fits(middle) else (low, middle)
  return low


def min_max(honest, kind):
  mean, p = honest.mean(axis=0), _perturbation(honest, kind)
  bound = max(np.linalg.norm(a - b) for a in honest for b in honest)

  def fits(gamma):
    row = mean - gamma * p
    return max(np.linalg.norm(row - x) for x in honest) <= bound

  return mean - _largest(fits) * p


def min_sum(honest, kind):
  mean, p = honest.mean(axis=0), _perturbation(honest, kind)
  bound = max(sum(np.sum((a - b) ** 2) for b in honest) for a in honest)

  def fits(gamma):
    row = mean - gamma * p
    return sum(np.sum((row - x) ** 2) for x in honest) <= bound

  return mean - _largest(fits) * p


def mimic_farthest(honest):
  _, _, directions = np.linalg.svd(honest - honest.mean(axis=0))
  return honest[np.argmax(np.abs(honest @ directions[0]))]


def fang_interval(honest, spread):
  """Returns the two ends between which every coordinate is drawn."""
  ends = []
  for values in honest.T:
    low, high = values.min(), values.max()
    if values.mean() < 0:
      ends.append((high, spread * high if high > 0 else high / spread))
    else:
      ends.append((low / spread if low > 0 else spread * low, low))
  return np.array(ends).T


def krum_choice(rows, f):
  """Returns the row that Krum selects."""
  scores = []
  for i, row in enumerate(rows):
    others = [np.sum((row - x) ** 2) for j, x in enumerate(rows) if j != i]
    scores.append(sum(sorted(others)[: len(rows) - f - 2]))
  return int(np.argmin(scores))


def fang_krum(honest, n, f, num_halvings=20):
  m, d = n, honest.shape[1]
  sums = []
  for i, row in enumerate(honest):
    others = [np.sum((row - x) ** 2) for j, x in enumerate(honest) if j != i]
    sums.append(sum(sorted(others)[: m - f - 2]))
  step = np.sqrt(min(sums) / ((m - 2 * f - 1) * d))
  step += max(np.linalg.norm(x) for x in honest) / np.sqrt(d)
  signs = np.sign(honest.mean(axis=0))
  for _ in range(num_halvings):
    rows = np.concatenate([honest, np.tile(-step * signs, (f, 1))])
    if krum_choice(rows, f) >= n - f:
      break
    step /= 2
  return -step * signs


def line_search(value, num_evaluations, first_step):
  """Tries 0, then steps that double while they help, then ones that shrink."""
  best, best_value = 0.0, value(0.0)
  step, grows = first_step, True
  for _ in range(num_evaluations - 1):
    factor = abs(best + step)
    found = value(factor)
    if found > best_value:
      best, best_value = factor, found
    else:
      grows = False
    step = 2 * step if grows else -0.8 * step
  return best


def optimal(honest, f, row, aggregate, num_evaluations=20, first_step=10.0):
  mean = honest.mean(axis=0)

  def damage(factor):
    rows = np.concatenate([honest, np.tile(row(factor), (f, 1))])
    return np.linalg.norm(aggregate(rows) - mean)

  return row(line_search(damage, num_evaluations, first_step))
