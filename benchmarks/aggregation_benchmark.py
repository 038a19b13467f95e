"""Times the aggregation rules against ByzFL and against the memory.

Rule, peer and floor take turns in one process on the same array and the same
cores; figures are minima over the turns, so that they hold on a busy machine
too. Wall time counts waiting for a core, CPU time is added over the cores.
The floor reads the array once and writes one row: `weights @ deltas`.

The peer needs PyTorch and `pip install --no-deps byzfl`; without them its
columns stay empty. Prints one JSON object:

  python -m benchmarks.aggregation_benchmark --clients=10 --params=4200000
"""

import argparse
import functools
import importlib
import importlib.util
import json
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_safety import aggregators

# Rules whose work grows faster than a product of the rows with themselves.
SLOW_ABOVE = 32
SLOW = frozenset({'residual_reweighting', 'lasa', 'dnc', 'alignins'})


def load_byzfl() -> types.ModuleType | None:
  """Imports the aggregators of ByzFL without its datasets and plots."""
  spec = importlib.util.find_spec('byzfl')
  if spec is None or importlib.util.find_spec('torch') is None:
    return None
  package = types.ModuleType('byzfl')
  package.__path__ = list(spec.submodule_search_locations)
  sys.modules['byzfl'] = package
  return importlib.import_module('byzfl.aggregators')


def rules(f: int) -> dict[str, Callable]:
  """Returns name -> `rule(deltas)` for all that are registered, and chains."""
  key = jax.random.key(0)
  step = {name: getattr(aggregators, name) for name in aggregators.names()}
  byzantine = (
    'trimmed_mean meamed phocas bulyan mda smea caf cge monna dnc'.split()
  )
  chosen = {name: {'num_byzantine': f} for name in byzantine}
  chosen |= {
    # The definitions that ByzFL has.
    'krum': {'num_byzantine': f, 'variant': 'byzfl'},
    'multi_krum': {'num_byzantine': f, 'variant': 'byzfl'},
    'geometric_median': {
      'num_iterations': 3,
      'start': 'mean',
      'smoothing': 0.1,
    },
    'centered_clipping': {'clip_norm': 1000.0},
    'norm_bounded_mean': {'max_norm': 1000.0},
    'robust_learning_rate': {'threshold': 4.0},
  }
  table = {}
  for name, rule in step.items():
    wanted = aggregators.inputs(name)
    if wanted & {'root_delta', 'loss_fn'}:
      continue  # needs data of the server's own
    kwargs = chosen.get(name, {}) | ({'key': key} if 'key' in wanted else {})
    table[name] = functools.partial(rule, **kwargs)
  mixing = aggregators.nearest_neighbor_mixing(num_byzantine=f)
  clipping = aggregators.adaptive_clipping(num_byzantine=f)
  krum = aggregators.krum(**chosen['krum'])
  trimmed_mean = aggregators.trimmed_mean(num_byzantine=f)
  table |= {
    'nearest_neighbor_mixing': lambda x: aggregators.nearest_neighbor_mixing(
      x, num_byzantine=f
    ),
    'mixing + krum': aggregators.chain(mixing, krum),
    'mixing + trimmed_mean': aggregators.chain(mixing, trimmed_mean),
    'clipping + mixing + trimmed_mean': aggregators.chain(
      clipping, mixing, trimmed_mean
    ),
  }
  return table


def peers(byzfl: Any, f: int) -> dict[str, Callable]:
  """Returns name -> the same of ByzFL; the centers start from zero."""
  if byzfl is None:
    return {}
  mixing, clipping = byzfl.NNM(f=f), byzfl.ARC(f=f)
  trimmed_mean, krum = byzfl.TrMean(f=f), byzfl.Krum(f=f)
  return {
    'mean': byzfl.Average(),
    'median': byzfl.Median(),
    'trimmed_mean': trimmed_mean,
    'meamed': byzfl.Meamed(f=f),
    'krum': krum,
    'multi_krum': byzfl.MultiKrum(f=f),
    'geometric_median': byzfl.GeometricMedian(nu=0.1, T=3),
    'centered_clipping': lambda x: byzfl.CenteredClipping(tau=1000.0)(x),
    'mda': byzfl.MDA(f=f),
    'smea': byzfl.SMEA(f=f),
    'caf': byzfl.CAF(f=f),
    'monna': byzfl.MoNNA(f=f),
    'nearest_neighbor_mixing': mixing,
    'mixing + krum': lambda x: krum(mixing(x)),
    'mixing + trimmed_mean': lambda x: trimmed_mean(mixing(x)),
    'clipping + mixing + trimmed_mean': lambda x: trimmed_mean(
      mixing(clipping(x))
    ),
  }


def timed(function: Callable, deltas: Any) -> tuple[float, float, Any]:
  """Returns wall and CPU milliseconds of one call, and what it returned."""
  wall, cpu = time.perf_counter(), time.process_time()
  result = function(deltas)
  jax.block_until_ready(result)
  wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
  return 1e3 * wall, 1e3 * cpu, result


def take_turns(sides: dict, repeats: int, seconds: float) -> dict:
  """Calls each `(function, deltas)` in turn; returns minima and results."""
  best, results, start = {}, {}, time.perf_counter()
  for turn in range(repeats + 1):
    for name, (function, deltas) in sides.items():
      wall, cpu, results[name] = timed(function, deltas)
      if turn <= 1:  # the first call warms up, but counts if it is the last
        best[name] = wall, cpu
      best[name] = tuple(map(min, best[name], (wall, cpu)))
    if time.perf_counter() - start > seconds:
      break
  return {name: (*best[name], results[name]) for name in sides}


def measure(rule, peer, floor, deltas, rows, args) -> dict:
  """Compiles a rule and lets it take turns with its peer and the floor."""
  wall, cpu = time.perf_counter(), time.process_time()
  compiled = jax.jit(rule).lower(deltas).compile()
  wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
  memory = compiled.memory_analysis()
  sides = {'rule': (compiled, deltas), 'floor': (floor, deltas)}
  if peer is not None:
    sides['peer'] = peer, rows
  times = take_turns(sides, args.repeats, args.seconds)
  ms, cpu_ms, result = times['rule']
  record = {
    'ms': ms,
    'cpu_ms': cpu_ms,
    'floor_ms': times['floor'][0],
    'share_of_floor': times['floor'][1] / cpu_ms,
    'compile_s': wall,
    'compile_cpu_s': cpu,
    'extra_copies': (memory.temp_size_in_bytes + memory.output_size_in_bytes)
    / deltas.nbytes,
  }
  if peer is not None:
    peer_ms, peer_cpu_ms, other = times['peer']
    record |= {
      'peer_ms': peer_ms,
      'peer_cpu_ms': peer_cpu_ms,
      'ratio': peer_ms / ms,
      'cpu_ratio': peer_cpu_ms / cpu_ms,
      'difference': float(np.max(np.abs(np.asarray(result) - other.numpy()))),
    }
  return {name: float(f'{value:.4g}') for name, value in record.items()}


def as_torch(values: np.ndarray) -> Any:
  """Returns a tensor over the same memory."""
  import torch

  return torch.from_numpy(values)


def report(args: argparse.Namespace) -> dict:
  """Measures the chosen rules on one array."""
  f = args.num_byzantine or args.clients // 5
  rng = np.random.default_rng(0)
  shape = args.clients, args.params
  values = rng.standard_normal(shape, dtype=np.float32)
  deltas = jnp.asarray(values)
  byzfl = None if args.no_peer else load_byzfl()
  rows = None if byzfl is None else as_torch(values)
  weights = jnp.full(args.clients, 1 / args.clients)
  floor = jax.jit(lambda x: weights @ x)
  table, others, measured = rules(f), peers(byzfl, f), {}
  for name in args.rules.split(',') if args.rules else table:
    if not args.rules and args.clients > SLOW_ABOVE and name in SLOW:
      continue
    try:
      record = measure(table[name], others.get(name), floor, deltas, rows, args)
    except ValueError as error:  # too many subsets for this cohort
      record = {'refused': str(error)}
    measured[name] = record
    print(name, json.dumps(record), file=sys.stderr, flush=True)
  return {
    'clients': args.clients,
    'params': args.params,
    'num_byzantine': f,
    'device': jax.devices()[0].device_kind,
    'jax': jax.__version__,
    'rules': measured,
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--clients', type=int, default=10)
  parser.add_argument('--params', type=int, default=4_200_000)
  parser.add_argument(
    '--num_byzantine', type=int, default=0, help='0: a fifth of the clients'
  )
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument(
    '--seconds', type=float, default=30.0, help='per rule, after which it ends'
  )
  parser.add_argument(
    '--rules', default='', help='comma separated; all if empty'
  )
  parser.add_argument('--no_peer', action='store_true')
  print(json.dumps(report(parser.parse_args()), indent=2))


if __name__ == '__main__':
  main()
