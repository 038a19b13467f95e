"""Counting a program's arithmetic from its jaxpr, loops included.

XLA's own count takes the body of a loop once, however often it runs.
"""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend import core


def _dot(equation: Any) -> int:
  """Returns the operations of one product: a multiplication and a sum."""
  (contracted, _), _ = equation.params['dimension_numbers']
  left = equation.invars[0].aval.shape
  terms = math.prod(left[axis] for axis in contracted)
  return 2 * terms * math.prod(equation.outvars[0].aval.shape)


def _convolution(equation: Any) -> int:
  """Returns the operations of one convolution."""
  kernel = equation.invars[1].aval.shape
  outputs = kernel[equation.params['dimension_numbers'].rhs_spec[0]]
  terms = math.prod(kernel) // outputs
  return 2 * terms * math.prod(equation.outvars[0].aval.shape)


_PRODUCTS = {'dot_general': _dot, 'conv_general_dilated': _convolution}


def _inner(value: Any) -> Iterator[Any]:
  """Yields the jaxprs in a parameter of an equation."""
  if isinstance(value, core.ClosedJaxpr):
    yield value.jaxpr
  elif isinstance(value, core.Jaxpr):
    yield value
  elif isinstance(value, tuple | list):
    for item in value:
      yield from _inner(item)


def count(jaxpr: core.Jaxpr) -> int:
  """Returns the floating-point operations of all products of matrices.

  A scan counts its body times its length, a condition its dearest branch, a
  `while` of unknown length its body once, a kernel every step of its grid. Of
  the work on several devices all is counted.

  Args:
    jaxpr: as `jax.jit(f).trace(*args).jaxpr.jaxpr`.
  """
  total = 0
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    if name in _PRODUCTS:
      total += _PRODUCTS[name](equation)
      continue
    bodies = [
      count(body)
      for value in equation.params.values()
      for body in _inner(value)
    ]
    if name == 'cond':
      total += max(bodies)
    elif name == 'pallas_call':
      total += sum(bodies) * math.prod(equation.params['grid_mapping'].grid)
    elif name == 'shard_map':
      total += sum(bodies) * equation.params['mesh'].size
    else:
      total += sum(bodies) * equation.params.get('length', 1)
  return total


def of(traced: Any) -> int:
  """Returns the operations of a traced function; see `count`."""
  return count(traced.jaxpr.jaxpr)
