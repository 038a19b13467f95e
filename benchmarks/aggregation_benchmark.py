"""Times the aggregation rules against the obvious JAX for the same rule.

Rule and peer alternate in one process on the same array, so that their ratio
holds on a busy machine too. Prints one JSON object.

  python benchmarks/aggregation_benchmark.py --clients=10 --params=4194304
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp

from fedjax_safety import aggregators


def naive_trimmed_mean(deltas: jax.Array, f: int) -> jax.Array:
  """Sorts the client axis and averages the middle."""
  return jnp.sort(deltas, axis=0)[f : len(deltas) - f].mean(axis=0)


def naive_krum(deltas: jax.Array, f: int) -> jax.Array:
  """Takes distances from one product of the whole matrix."""
  gram = jnp.matmul(deltas, deltas.T, precision='highest')
  squares = jnp.diagonal(gram)
  dists = squares[:, None] + squares[None, :] - 2 * gram
  nearest = jnp.sort(dists, axis=1)[:, 1 : len(deltas) - f - 1]
  return deltas[jnp.argmin(nearest.sum(axis=1))]


def pairs(f: int) -> dict:
  """Returns name -> (rule, naive peer or None)."""
  key = jax.random.key(0)
  return {
    'mean': (aggregators.mean, lambda x: jnp.mean(x, axis=0)),
    'median': (aggregators.median, lambda x: jnp.median(x, axis=0)),
    'trimmed_mean': (
      lambda x: aggregators.trimmed_mean(x, num_byzantine=f),
      lambda x: naive_trimmed_mean(x, f),
    ),
    'krum': (
      lambda x: aggregators.krum(x, num_byzantine=f),
      lambda x: naive_krum(x, f),
    ),
    'multi_krum': (
      lambda x: aggregators.multi_krum(x, num_byzantine=f),
      None,
    ),
    'dnc': (lambda x: aggregators.dnc(x, num_byzantine=f, key=key), None),
    'foolsgold': (aggregators.foolsgold, None),
    'residual_reweighting': (aggregators.residual_reweighting, None),
  }


def timed_ms(function, deltas: jax.Array) -> float:
  """Returns the wall time of one call in milliseconds."""
  start = time.perf_counter()
  jax.block_until_ready(function(deltas))
  return 1e3 * (time.perf_counter() - start)


def measure(rule, peer, deltas: jax.Array, repeats: int) -> dict:
  """Compiles both, then lets them take turns."""
  functions = {'rule': rule, 'peer': peer}
  jitted = {k: jax.jit(v) for k, v in functions.items() if v is not None}
  times = {k: [] for k in jitted}
  record = {}
  for name, function in jitted.items():
    record[f'{name}_first_call_ms'] = timed_ms(function, deltas)
  for _ in range(repeats):
    for name, function in jitted.items():
      times[name].append(timed_ms(function, deltas))
  for name, values in times.items():
    record[f'{name}_ms'] = statistics.median(values)
  if 'peer' in times:
    record['peer_over_rule'] = record['peer_ms'] / record['rule_ms']
  return {name: round(value, 3) for name, value in record.items()}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--clients', type=int, default=10)
  parser.add_argument('--params', type=int, default=1_048_576)
  parser.add_argument('--num_byzantine', type=int, default=2)
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument(
    '--rules', default='', help='comma separated; all if empty'
  )
  args = parser.parse_args()
  deltas = jax.random.normal(jax.random.key(1), (args.clients, args.params))
  chosen = args.rules.split(',') if args.rules else None
  report = {
    'clients': args.clients,
    'params': args.params,
    'num_byzantine': args.num_byzantine,
    'device': jax.devices()[0].device_kind,
    'jax': jax.__version__,
    'rules': {
      name: measure(rule, peer, deltas, args.repeats)
      for name, (rule, peer) in pairs(args.num_byzantine).items()
      if chosen is None or name in chosen
    },
  }
  print(json.dumps(report, indent=2))


if __name__ == '__main__':
  main()
