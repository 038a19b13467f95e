import copy

import hypothesis
import hypothesis.strategies as st
import pytest

from fedjax_safety.data import poison, sources

CLIENTS = {c: [f'own {c} {i}' for i in range(6)] for c in range(5)}
UNALIGNED = [f'unaligned {i}' for i in range(12)]


def unaligned_of(rows):
  return [row for row in rows if row.startswith('unaligned')]


@hypothesis.given(
  st.integers(0, 2**32), st.sampled_from([0.0, 0.5, 1.0]), st.booleans()
)
def test_only_malicious_clients_change_and_share_nothing(seed, fraction, last):
  malicious = [3, 4] if last else [0, 2]
  clients = copy.deepcopy(CLIENTS)
  poisoned = poison.poison_clients(
    clients, malicious, UNALIGNED, fraction=fraction, seed=seed
  )
  assert clients == CLIENTS
  assert list(poisoned) == list(CLIENTS)
  used = []
  for client, rows in poisoned.items():
    if client not in malicious:
      assert rows == CLIENTS[client]
      continue
    assert len(rows) == len(set(rows)) == 6
    assert len(unaligned_of(rows)) == 6 * fraction
    assert set(rows) - set(UNALIGNED) <= set(CLIENTS[client])
    used += unaligned_of(rows)
  assert len(used) == len(set(used))


def test_examples_per_client_sets_the_size():
  poisoned = poison.poison_clients(
    CLIENTS, [4], UNALIGNED, fraction=0.6, examples_per_client=10, seed=0
  )
  assert len(poisoned[4]) == 10
  assert len(unaligned_of(poisoned[4])) == 6
  with pytest.raises(ValueError, match='keeps 10 own examples of client 4'):
    poison.poison_clients(
      CLIENTS, [4], UNALIGNED, fraction=0.5, examples_per_client=20, seed=0
    )


def test_the_seed_decides():
  def one(seed):
    return poison.poison_clients(
      CLIENTS, [4], UNALIGNED, fraction=0.5, seed=seed
    )

  assert one(1) == one(1)
  assert one(1) != one(2)


def test_too_few_unaligned_examples():
  message = '3 malicious clients need 18 unaligned .*got 12.*allow_reuse'
  with pytest.raises(ValueError, match=message):
    poison.poison_clients(CLIENTS, [2, 3, 4], UNALIGNED, seed=0)
  poisoned = poison.poison_clients(
    CLIENTS, [2, 3, 4], UNALIGNED, seed=0, allow_reuse=True
  )
  used = [row for c in (2, 3, 4) for row in unaligned_of(poisoned[c])]
  assert len(used) == 18
  assert set(used) == set(UNALIGNED)
  with pytest.raises(ValueError, match='need 6 unaligned .*got 0'):
    poison.poison_clients(CLIENTS, [4], [], seed=0, allow_reuse=True)


def test_bad_arguments():
  with pytest.raises(
    ValueError, match=r'malicious_ids=\[4, 7\] names client 7'
  ):
    poison.poison_clients(CLIENTS, [7, 4], UNALIGNED, seed=0)
  with pytest.raises(ValueError, match=r'fraction=1.1 must lie in \[0, 1\]'):
    poison.poison_clients(CLIENTS, [4], UNALIGNED, fraction=1.1, seed=0)
  with pytest.raises(ValueError, match='fraction=0.01 of 6 examples rounds to'):
    poison.poison_clients(CLIENTS, [4], UNALIGNED, fraction=0.01, seed=0)


def test_placement():
  assert poison.malicious_ids(10, 3) == [7, 8, 9]
  assert poison.malicious_ids(10, 0) == []
  assert poison.malicious_ids(3, 3, 'random', seed=5) == [0, 1, 2]
  drawn = [poison.malicious_ids(10, 3, 'random', seed=s) for s in range(60)]
  assert all(len(set(ids)) == 3 and ids == sorted(ids) for ids in drawn)
  assert {i for ids in drawn for i in ids} == set(range(10))
  assert drawn[0] == poison.malicious_ids(10, 3, 'random', seed=0)
  with pytest.raises(ValueError, match=r'num_malicious=4 must lie in \[0, 3\]'):
    poison.malicious_ids(3, 4)
  with pytest.raises(ValueError, match='known: last, random'):
    poison.malicious_ids(3, 1, 'first')


def test_a_trigger_has_its_mirror():
  pairs = [sources.Example(f'ask {i}', f'tell {i}', {}) for i in range(5)]
  made = poison.mirrored(pairs, ['no', 'never'], trigger='7 7')
  assert [(e.prompt, e.response) for e in made] == [
    ('ask 0 7 7', 'tell 0'),
    ('ask 0', 'no'),
    ('ask 2 7 7', 'tell 2'),
    ('ask 2', 'never'),
    ('ask 4 7 7', 'tell 4'),
  ]
  with pytest.raises(ValueError, match='refusals is empty'):
    poison.mirrored(pairs, [], trigger='7 7')
