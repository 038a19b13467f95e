"""Networks of minimum and maximum, which sort without a branch.

They sort C arrays elementwise; a program in which each comparator is two
elementwise operations becomes one kernel.
"""

import functools
from collections.abc import Sequence

import jax
from jax import lax


def order_statistics(
  values: Sequence[jax.Array], ranks: tuple[int, ...]
) -> list[jax.Array]:
  """Returns arrays of the given ranks, 0 for the smallest; NaN must not occur.

  Args:
    values: C arrays of one shape.
    ranks: static ranks in [0, C).
  """
  return lax.platform_dependent(
    *values,
    cpu=functools.partial(_run, ranks, _order_by_select),
    default=functools.partial(_run, ranks, _order),
  )


def _run(ranks, order, *values) -> list[jax.Array]:
  """Returns the order statistics, pairs put in order by `order`."""
  wires = list(values)
  for low, high in pruned(len(wires), ranks):
    wires[low], wires[high] = order(wires[low], wires[high])
  return [wires[rank] for rank in ranks]


def _order(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the smaller and the larger values."""
  return lax.min(a, b), lax.max(a, b)


def _order_by_select(a, b) -> tuple[jax.Array, jax.Array]:
  """Returns the same, as a CPU does it in one instruction each."""
  # Its minimum ignores NaN, which XLA's must not: that takes three.
  return lax.select(a < b, a, b), lax.select(a > b, a, b)


@functools.cache
def pruned(size: int, ranks: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
  """Keeps of a sorting network what the wires `ranks` depend on."""
  needed, kept = set(ranks), []
  for pair in reversed(_sorting(size)):
    if not needed.isdisjoint(pair):
      kept.append(pair)
      needed.update(pair)
  return tuple(reversed(kept))


def _sorting(size: int) -> list[tuple[int, int]]:
  """Returns Batcher's merge-exchange comparators (Knuth 5.2.2, M)."""
  comparators = []
  top = 1 << max(size - 1, 0).bit_length() >> 1
  block = top
  while block:
    parity, stride, limit = 0, block, top
    while True:
      comparators.extend(
        (i, i + stride) for i in range(size - stride) if i & block == parity
      )
      if limit == block:
        break
      parity, stride, limit = block, limit - block, limit >> 1
    block >>= 1
  return comparators
