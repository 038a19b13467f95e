"""One client's work in a round: local optimizer steps on its own data."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_safety import tree, types

# (base_params, adapter, tokens[B, L], loss_mask[B, L], key) -> scalar loss
LossFn = Callable[..., jax.Array]


class ClientOutput(NamedTuple):
  """What one client sends back.

  Attributes:
    delta: adapter after minus adapter before.
    loss: `float32[S]`, the loss before each local step.
  """

  delta: types.Adapter
  loss: jax.Array


def adamw(
  learning_rate: jax.Array, *, weight_decay: float = 0.0
) -> optax.GradientTransformation:
  """AdamW as the paper's clients run it: fresh every round, no decay."""
  return optax.adamw(learning_rate, weight_decay=weight_decay)


def sgd(
  learning_rate: jax.Array, *, weight_decay: float = 0.0
) -> optax.GradientTransformation:
  """SGD without momentum; decay adds `weight_decay * w` to the gradient."""
  return optax.chain(
    optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate)
  )


OPTIMIZERS = {'adamw': adamw, 'sgd': sgd}


def local_update(
  base_params: types.BaseParams,
  adapter: types.Adapter,
  tokens: jax.Array,
  loss_mask: jax.Array,
  key: jax.Array,
  learning_rate: jax.Array,
  *,
  loss_fn: LossFn,
  optimizer: Callable[[jax.Array], optax.GradientTransformation] = adamw,
  trainable: types.PyTree | None = None,
  correct: Callable[..., types.Adapter] | None = None,
  switches: jax.Array | None = None,
) -> ClientOutput:
  """Trains a copy of the adapter for S steps and returns its change.

  The optimizer starts anew. Pure, so `jax.vmap` over `tokens`, `loss_mask`
  and `key` trains a cohort while the base is shared and stays unbatched.

  Args:
    base_params: frozen parameters.
    adapter: the adapter that the server sent.
    tokens: `int32[S, B, L]`, one batch a local step.
    loss_mask: `[S, B, L]`, nonzero on answer tokens.
    key: this client's key in this round; dropout draws from it.
    learning_rate: scalar, constant within the round.
    loss_fn: `(base_params, adapter, tokens, loss_mask, key) -> loss`.
    optimizer: makes an optax transformation from a learning rate.
    trainable: tree of bool scalars; leaves that are not stay as they are, and
      have delta 0. None trains all.
    correct: `(grads, adapter, start) -> grads`, before the optimizer sees
      them; `start` is the adapter that the server sent, or
    switches: `bool[S]`: that before the last local step where it is true.

  Returns:
    The delta and the losses.
  """
  transform = optimizer(learning_rate)

  def step(carry, batch):
    now, state, start = carry
    step_tokens, step_mask, index = batch
    if switches is not None:
      start = jax.tree.map(
        functools.partial(jnp.where, switches[index]), now, start
      )
    loss, grads = jax.value_and_grad(loss_fn, argnums=1)(
      base_params,
      now,
      step_tokens,
      step_mask,
      jax.random.fold_in(key, index),
    )
    if trainable is not None:
      # A gradient that is known to be 0 is not computed.
      grads = tree.keep_leaves(trainable, grads)
    if correct is not None:
      grads = correct(grads, now, adapter if switches is None else start)
    updates, state = transform.update(grads, state, now)
    if trainable is not None:
      # Weight decay moves a leaf without any gradient.
      updates = tree.keep_leaves(trainable, updates)
    return (optax.apply_updates(now, updates), state, start), loss

  steps = jnp.arange(tokens.shape[0])
  carry = (
    adapter,
    transform.init(adapter),
    () if switches is None else adapter,
  )
  (trained, *_), loss = jax.lax.scan(step, carry, (tokens, loss_mask, steps))
  delta = jax.tree.map(jnp.subtract, trained, adapter)
  return ClientOutput(delta, loss)
