"""The server's step: the aggregated delta as a pseudo-gradient.

FedAvg, FedAvgM (Hsu, Qi, Brown, 2019) and the adaptive three of Reddi et al.
(ICLR 2021, Algorithm 2): no bias correction, second moment from `tau ** 2`.
Where other frameworks compute something else under the same name, that is a
`variant`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_safety import _validate, types

_VARIANTS = ('paper', 'flower', 'openfedllm')

# (second moment, squares, b2) -> second moment.
_SECOND_MOMENT = {
  'fedadagrad': lambda v, g2, b2: v + g2,
  'fedyogi': lambda v, g2, b2: v - (1 - b2) * g2 * jnp.sign(v - g2),
  'fedadam': lambda v, g2, b2: b2 * v + (1 - b2) * g2,
}


class _Moments(NamedTuple):
  """Running means of pseudo-gradients and of squares, and steps done."""

  first: types.Adapter
  second: types.Adapter
  count: jax.Array


def _check_decay(**kwargs: float) -> None:
  """Raises unless every value can weigh a running mean."""
  for name, value in kwargs.items():
    if not 0 <= value < 1:
      raise ValueError(f'{name}={value} must be at least 0 and below 1')


def _smooth(mean, grads, b1, *, count=None):
  """Returns the running mean; with a count, it starts at the first one."""

  def leaf(m, g):
    smoothed = b1 * m + (1 - b1) * g
    return smoothed if count is None else jnp.where(count == 0, g, smoothed)

  return jax.tree.map(leaf, mean, grads)


def _fedavg(learning_rate: float) -> optax.GradientTransformation:
  return optax.sgd(learning_rate)


def _fedavgm(
  learning_rate: float, *, momentum: float = 0.9, variant: str = 'paper'
) -> optax.GradientTransformation:
  _validate.one_of(('paper', 'openfedllm'), variant=variant)
  _check_decay(momentum=momentum)
  if variant == 'paper':
    return optax.sgd(learning_rate, momentum=momentum)

  def init(params):
    return jax.tree.map(jnp.zeros_like, params), jnp.zeros((), jnp.int32)

  def update(grads, state, params=None):
    del params
    mean, count = state
    mean = _smooth(mean, grads, momentum, count=count)
    return jax.tree.map(lambda m: -learning_rate * m, mean), (mean, count + 1)

  return optax.GradientTransformation(init, update)


def _fedadagrad(
  learning_rate: float,
  *,
  b1: float = 0.0,
  tau: float = 1e-3,
  variant: str = 'paper',
) -> optax.GradientTransformation:
  if variant != 'paper' and b1 != 0:
    raise ValueError(
      f'b1={b1} must be 0 (fedadagrad, variant {variant}): there it has no '
      f'momentum'
    )
  return _adaptive('fedadagrad', learning_rate, b1, 0.0, tau, variant)


def _with_decay(name: str) -> Callable[..., optax.GradientTransformation]:
  """Returns the maker of fedyogi or fedadam."""

  def make(
    learning_rate: float,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    tau: float = 1e-3,
    variant: str = 'paper',
  ) -> optax.GradientTransformation:
    return _adaptive(name, learning_rate, b1, b2, tau, variant)

  return make


def _adaptive(
  name: str,
  learning_rate: float,
  b1: float,
  b2: float,
  tau: float,
  variant: str,
) -> optax.GradientTransformation:
  """Makes Algorithm 2 of Reddi et al., or what a framework makes of it."""
  _validate.one_of(_VARIANTS, variant=variant)
  _check_decay(b1=b1, b2=b2)
  _validate.positive(tau=tau)
  start = 0.0 if variant == 'flower' else tau**2
  smooths_first = variant == 'openfedllm'
  corrects = variant == 'flower' and name == 'fedadam'

  def init(params):
    first = jax.tree.map(jnp.zeros_like, params)
    second = jax.tree.map(lambda p: jnp.full_like(p, start), params)
    return _Moments(first, second, jnp.zeros((), jnp.int32))

  def update(grads, state, params=None):
    del params
    count = state.count
    first = _smooth(
      state.first, grads, b1, count=count if smooths_first else None
    )
    second = jax.tree.map(
      lambda v, g: _SECOND_MOMENT[name](v, g * g, b2),
      state.second,
      first if smooths_first else grads,
    )
    rate = learning_rate
    if corrects:
      # Flower counts rounds from 1 and adds one more.
      power = count.astype(jnp.float32) + 2
      rate = rate * jnp.sqrt(1 - b2**power) / (1 - b1**power)
    step = jax.tree.map(
      lambda m, v: -rate * m / (jnp.sqrt(v) + tau), first, second
    )
    return step, _Moments(first, second, count + 1)

  return optax.GradientTransformation(init, update)


OPTIMIZERS = {
  'fedavg': _fedavg,
  'fedavgm': _fedavgm,
  'fedadagrad': _fedadagrad,
  'fedyogi': _with_decay('fedyogi'),
  'fedadam': _with_decay('fedadam'),
}


def build(
  name: str, *, learning_rate: float = 1.0, **kwargs: Any
) -> optax.GradientTransformation:
  """Returns a server optimizer by name.

  With delta d, momentum b and learning rate r, and x the adapter, fedavgm is
  `u = b u + d; x = x + r u`. The adaptive three have `m = b1 m + (1 - b1) d`,
  a second moment v of d ** 2 that starts at `tau ** 2`, and
  `x = x + r m / (sqrt(v) + tau)`. The variants:

  * flower: v starts at 0; fedadam's learning rate has Adam's bias correction,
    with the exponent of the round after; fedadagrad has no momentum.
  * openfedllm: fedavgm has `u = b u + (1 - b) d`. The means u and m start as
    the first delta, and v is of m ** 2; fedadagrad has no momentum.

  Args:
    name: fedavg, fedavgm, fedadagrad, fedyogi or fedadam.
    learning_rate: the server's own; 1 with fedavg applies the delta as is.
    **kwargs: `momentum` (fedavgm); `b1` and `tau` (the adaptive three), `b2`
      (fedyogi, fedadam); `variant`: paper, openfedllm, or flower, which has
      fedavgm as the paper has it.

  Raises:
    ValueError: the name or an argument is unknown, or a value is out of
      range.

  Reference: Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan.
  Adaptive Federated Optimization. ICLR 2021.
  """
  _validate.one_of(OPTIMIZERS, server_optimizer=name)
  _validate.positive(learning_rate=learning_rate)
  _validate.keywords(f'server optimizer {name!r}', OPTIMIZERS[name], kwargs)
  return OPTIMIZERS[name](learning_rate, **kwargs)


def apply(
  optimizer: optax.GradientTransformation,
  adapter: types.Adapter,
  delta: types.Adapter,
  state: optax.OptState,
) -> tuple[types.Adapter, optax.OptState]:
  """Moves the adapter along the delta and returns it with the new state.

  The delta is negated here, and only here, to make a pseudo-gradient.
  """
  pseudo_gradient = jax.tree.map(jnp.negative, delta)
  updates, state = optimizer.update(pseudo_gradient, state, adapter)
  return optax.apply_updates(adapter, updates), state
