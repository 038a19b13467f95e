"""Post-hoc defense: the server tunes the aggregated adapter on defense data.

No client is filtered out; whatever the rounds left in the adapter is trained
over with aligned and normal pairs. (Ye et al., ICLR 2025, section 5.)
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_safety import settings as settings_lib
from fedjax_safety import types
from fedjax_safety.data import templates

# Steps in one compiled call: enough to hide the call, few enough to report.
STEPS_PER_CALL = 10


def batches(
  encoded: templates.EncodedExamples,
  *,
  num_steps: int,
  batch_size: int,
  seed: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns `[num_steps, B, L]` tokens and masks, epoch after epoch.

  Every epoch is a new shuffle; examples without a trainable token are left
  out.

  Raises:
    ValueError: no example has a trainable token.
  """
  usable = np.flatnonzero(encoded.loss_mask.any(axis=1))
  if not usable.size:
    raise ValueError('no defense example has an answer left within max_length')
  rng = np.random.default_rng([seed, 7])
  needed = num_steps * batch_size
  epochs = [rng.permutation(usable) for _ in range(-(-needed // usable.size))]
  rows = np.concatenate(epochs)[:needed].reshape(num_steps, batch_size)
  return encoded.tokens[rows], encoded.loss_mask[rows]


def learning_rates(config: settings_lib.RepairConfig) -> np.ndarray:
  """Returns the learning rate of every step, cosine to the final one."""
  schedule = optax.cosine_decay_schedule(
    config.learning_rate,
    config.num_steps,
    config.final_learning_rate / config.learning_rate,
  )
  return np.asarray(jax.vmap(schedule)(jnp.arange(config.num_steps)))


@functools.lru_cache(maxsize=4)
def make_steps(loss_fn: Callable) -> Callable:
  """Returns the jitted program of a few AdamW steps, one for each loss.

  Args:
    loss_fn: `(base_params, adapter, tokens, loss_mask, key) -> loss`.

  Returns:
    `(base, adapter, opt_state, tokens[S, B, L], mask, rates[S], key) ->
    (adapter, opt_state, loss[S])`.
  """

  @jax.jit
  def steps(base_params, adapter, state, tokens, loss_mask, rates, key):
    def step(carry, inputs):
      adapter, state = carry
      tokens, loss_mask, rate, index = inputs
      loss, grads = jax.value_and_grad(loss_fn, argnums=1)(
        base_params, adapter, tokens, loss_mask, jax.random.fold_in(key, index)
      )
      updates, state = optax.scale_by_adam().update(grads, state)
      updates = jax.tree.map(lambda u: -rate * u, updates)
      return (optax.apply_updates(adapter, updates), state), loss

    index = jnp.arange(rates.shape[0])
    (adapter, state), loss = jax.lax.scan(
      step, (adapter, state), (tokens, loss_mask, rates, index)
    )
    return adapter, state, loss

  return steps


def repair(
  base_params: types.BaseParams,
  adapter: types.Adapter,
  encoded: templates.EncodedExamples,
  config: settings_lib.RepairConfig,
  *,
  loss_fn: Callable,
  seed: int,
) -> Iterator[tuple[int, types.Adapter, dict[str, Any]]]:
  """Tunes an adapter on defense data, a few steps at a time.

  Args:
    base_params: frozen parameters.
    adapter: the aggregated adapter.
    encoded: the defense data.
    config: steps, batch size, learning rate.
    loss_fn: `(base_params, adapter, tokens, loss_mask, key) -> loss`.
    seed: of the order of examples and of dropout.

  Yields:
    (steps done, adapter, metrics) after every few steps, the last time with
    `steps done == config.num_steps`.
  """
  tokens, loss_mask = batches(
    encoded,
    num_steps=config.num_steps,
    batch_size=config.batch_size,
    seed=seed,
  )
  rates = learning_rates(config)
  state = optax.scale_by_adam().init(adapter)
  run_steps = make_steps(loss_fn)
  key = jax.random.key(seed)
  for start in range(0, config.num_steps, STEPS_PER_CALL):
    part = slice(start, start + STEPS_PER_CALL)
    adapter, state, loss = run_steps(
      base_params,
      adapter,
      state,
      tokens[part],
      loss_mask[part],
      rates[part],
      jax.random.fold_in(key, start),
    )
    done = min(start + STEPS_PER_CALL, config.num_steps)
    yield (
      done,
      adapter,
      {
        'repair/loss': float(jnp.mean(loss)),
        'repair/learning_rate': float(rates[done - 1]),
      },
    )
