import collections

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from fedjax_safety.data import partition, sources

SEEDS = st.integers(0, 2**32)


def everyone(clients):
  return sorted(index for indices in clients.values() for index in indices)


@hypothesis.given(st.integers(1, 60), st.integers(1, 60), SEEDS)
def test_iid_deals_every_example_once(total, num_clients, seed):
  hypothesis.assume(num_clients <= total)
  clients = partition.iid(total, num_clients, seed=seed)
  assert list(clients) == list(range(num_clients))
  assert everyone(clients) == list(range(total))
  sizes = {len(indices) for indices in clients.values()}
  assert max(sizes) - min(sizes) <= 1
  assert min(sizes) >= 1


def test_iid_with_a_stated_size():
  clients = partition.iid(['x'] * 50, 4, seed=0, examples_per_client=12)
  assert [len(indices) for indices in clients.values()] == [12] * 4
  assert len(set(everyone(clients))) == 48
  assert clients == partition.iid(50, 4, seed=0, examples_per_client=12)
  assert clients != partition.iid(50, 4, seed=1, examples_per_client=12)


def test_iid_needs_enough_examples():
  with pytest.raises(ValueError, match='num_clients=5 at 1 .* need 5 .*got 4'):
    partition.iid(4, 5, seed=0)
  with pytest.raises(ValueError, match='num_clients=2 at 3 .* need 6 .*got 5'):
    partition.iid(5, 2, seed=0, examples_per_client=3)
  with pytest.raises(ValueError, match='num_clients=0 must be greater'):
    partition.iid(4, 0, seed=0)
  with pytest.raises(ValueError, match='seed=-1 must be at least 0'):
    partition.iid(4, 2, seed=-1)


@hypothesis.given(SEEDS, st.floats(0.3, 100.0))
def test_dirichlet_deals_every_example_once(seed, alpha):
  labels = ['a', 'b', 'c'] * 20
  clients = partition.dirichlet(labels, 4, alpha=alpha, seed=seed)
  assert list(clients) == [0, 1, 2, 3]
  assert everyone(clients) == list(range(60))
  assert all(clients.values())
  assert clients == partition.dirichlet(labels, 4, alpha=alpha, seed=seed)


def mean_largest_share(alpha):
  labels = ['a', 'b'] * 500
  shares = []
  for seed in range(10):
    clients = partition.dirichlet(labels, 5, alpha=alpha, seed=seed)
    for indices in clients.values():
      counts = collections.Counter(labels[index] for index in indices)
      shares.append(max(counts.values()) / len(indices))
  return np.mean(shares)


def test_small_alpha_separates_labels_and_large_alpha_does_not():
  assert mean_largest_share(0.1) > 0.8
  assert mean_largest_share(1000.0) < 0.55


def test_dirichlet_reports_clients_that_stay_empty():
  with pytest.raises(ValueError, match='alpha=0.001 left a client with fewer'):
    partition.dirichlet(['a'] * 40, 20, alpha=0.001, seed=0)
  with pytest.raises(ValueError, match='alpha=0.0 must be greater'):
    partition.dirichlet(['a'] * 40, 20, alpha=0.0, seed=0)
  with pytest.raises(ValueError, match='need 4 examples; got 3'):
    partition.dirichlet(['a'] * 3, 4, alpha=1.0, seed=0)


def test_dirichlet_keeps_a_minimum():
  clients = partition.dirichlet(
    ['a', 'b'] * 50, 4, alpha=0.5, seed=3, min_examples=8
  )
  assert min(map(len, clients.values())) >= 8


def test_natural_groups_by_column():
  examples = [
    sources.Example('p', 'r', {'user': user}) for user in ('u2', 'u1', 'u2')
  ]
  clients = partition.natural(examples, 'user')
  assert clients == {'u1': [1], 'u2': [0, 2]}
  assert list(clients) == ['u1', 'u2']
  assert partition.number(clients) == ({0: [1], 1: [0, 2]}, ['u1', 'u2'])
  with pytest.raises(ValueError, match="'usr' is missing.*mean 'user'.*: user"):
    partition.natural(examples, 'usr')
  with pytest.raises(ValueError, match='examples is empty'):
    partition.natural([], 'user')
