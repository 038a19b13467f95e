"""The server's step: the aggregated delta as a pseudo-gradient.

FedAvg, FedAvgM (Hsu, Qi, Brown, 2019) and the adaptive three of Reddi et al.
(ICLR 2021, Algorithm 2): no bias correction, second moment from `tau ** 2`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fedjax_safety import _validate, types


def _fedavg(learning_rate: float) -> optax.GradientTransformation:
  return optax.sgd(learning_rate)


def _fedavgm(
  learning_rate: float, *, momentum: float = 0.9
) -> optax.GradientTransformation:
  return optax.sgd(learning_rate, momentum=momentum)


def _adaptive(second_moment: Callable) -> Callable:
  """Makes a server optimizer from its rule for the second moment."""

  def make(
    learning_rate: float,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    tau: float = 1e-3,
  ) -> optax.GradientTransformation:
    def init(params):
      mu = jax.tree.map(jnp.zeros_like, params)
      nu = jax.tree.map(lambda p: jnp.full_like(p, tau**2), params)
      return mu, nu

    def update(grads, state, params=None):
      del params
      mu, nu = state
      mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, mu, grads)
      nu = jax.tree.map(lambda v, g: second_moment(v, g * g, b2), nu, grads)
      step = jax.tree.map(
        lambda m, v: -learning_rate * m / (jnp.sqrt(v) + tau), mu, nu
      )
      return step, (mu, nu)

    return optax.GradientTransformation(init, update)

  return make


OPTIMIZERS = {
  'fedavg': _fedavg,
  'fedavgm': _fedavgm,
  'fedadagrad': _adaptive(lambda v, g2, b2: v + g2),
  'fedyogi': _adaptive(lambda v, g2, b2: v - (1 - b2) * g2 * jnp.sign(v - g2)),
  'fedadam': _adaptive(lambda v, g2, b2: b2 * v + (1 - b2) * g2),
}


def build(
  name: str, *, learning_rate: float = 1.0, **kwargs: float
) -> optax.GradientTransformation:
  """Returns a server optimizer by name.

  Args:
    name: fedavg, fedavgm, fedadagrad, fedyogi or fedadam.
    learning_rate: the server's own; 1 with fedavg applies the delta as is.
    **kwargs: `momentum` (fedavgm); `b1`, `b2`, `tau` (the adaptive three).

  Raises:
    ValueError: the name or an argument is unknown.
  """
  _validate.one_of(OPTIMIZERS, server_optimizer=name)
  _validate.positive(learning_rate=learning_rate)
  try:
    return OPTIMIZERS[name](learning_rate, **kwargs)
  except TypeError:
    raise ValueError(
      f'server optimizer {name!r} does not take {sorted(kwargs)}'
    ) from None


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
