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
from fedjax_safety.repair import loss as repair_loss
from fedjax_safety.settings import repair as repair_settings

_STEPS = repair_settings.STEPS_PER_CALL


def batches(
  encoded: templates.EncodedExamples,
  is_normal: np.ndarray,
  *,
  num_steps: int,
  batch_size: int,
  seed: int,
) -> repair_loss.Batch:
  """Returns the batches of all steps, leading axis num_steps.

  They go through the data epoch after epoch. Every epoch is a new shuffle;
  examples without a trainable token are left out.

  Args:
    encoded: the defense data.
    is_normal: `bool[N]`, which of them are normal, not aligned.
    num_steps: optimizer steps.
    batch_size: examples of a step.
    seed: of the shuffles.

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
  return repair_loss.Batch(
    encoded.tokens[rows], encoded.loss_mask[rows], is_normal[rows]
  )


def learning_rates(config: settings_lib.RepairConfig) -> np.ndarray:
  """Returns the learning rate of every step, cosine to the final one."""
  schedule = optax.cosine_decay_schedule(
    config.learning_rate,
    config.num_steps,
    config.final_learning_rate / config.learning_rate,
  )
  return np.asarray(jax.vmap(schedule)(jnp.arange(config.num_steps)))


@functools.lru_cache(maxsize=4)
def make_steps(loss_fn: repair_loss.RepairLoss) -> Callable:
  """Returns the jitted program of a few AdamW steps, one for each loss.

  Args:
    loss_fn: `(frozen, adapter, batch, key) -> (loss, parts)`.

  Returns:
    `(frozen, adapter, opt_state, batches[S], rates[S], key) -> (adapter,
    opt_state, {'loss': float[S], part: float[S]})`.
  """

  @jax.jit
  def steps(frozen, adapter, state, batches, rates, key):
    def step(carry, inputs):
      adapter, state = carry
      batch, rate, index = inputs
      (loss, parts), grads = jax.value_and_grad(
        loss_fn, argnums=1, has_aux=True
      )(frozen, adapter, batch, jax.random.fold_in(key, index))
      updates, state = optax.scale_by_adam().update(grads, state)
      updates = jax.tree.map(lambda u: -rate * u, updates)
      carry = (optax.apply_updates(adapter, updates), state)
      return carry, {'loss': loss, **parts}

    index = jnp.arange(rates.shape[0])
    (adapter, state), values = jax.lax.scan(
      step, (adapter, state), (batches, rates, index)
    )
    return adapter, state, values

  return steps


def repair(
  base_params: types.BaseParams,
  adapter: types.Adapter,
  encoded: templates.EncodedExamples,
  is_normal: np.ndarray,
  config: settings_lib.RepairConfig,
  *,
  loss_fn: repair_loss.RepairLoss,
  seed: int,
) -> Iterator[tuple[int, types.Adapter, dict[str, Any]]]:
  """Tunes an adapter on defense data, a few steps at a time.

  Args:
    base_params: frozen parameters.
    adapter: the aggregated adapter.
    encoded: the defense data.
    is_normal: `bool[N]`, which of them are normal, not aligned.
    config: steps, batch size, learning rate.
    loss_fn: `(frozen, adapter, batch, key) -> (loss, parts)`.
    seed: of the order of examples and of dropout.

  Yields:
    (steps done, adapter, metrics) after every few steps, the last time with
    `steps done == config.num_steps`.
  """
  all_batches = batches(
    encoded,
    is_normal,
    num_steps=config.num_steps,
    batch_size=config.batch_size,
    seed=seed,
  )
  rates = learning_rates(config)
  frozen = repair_loss.Frozen(base_params, adapter)
  state = optax.scale_by_adam().init(adapter)
  run_steps = make_steps(loss_fn)
  key = jax.random.key(seed)
  for start in range(0, config.num_steps, _STEPS):
    part = slice(start, start + _STEPS)
    adapter, state, values = run_steps(
      frozen,
      adapter,
      state,
      jax.tree.map(lambda x, part=part: x[part], all_batches),
      rates[part],
      jax.random.fold_in(key, start),
    )
    done = min(start + _STEPS, config.num_steps)
    yield (
      done,
      adapter,
      {
        **{f'repair/{k}': float(jnp.mean(v)) for k, v in values.items()},
        'repair/learning_rate': float(rates[done - 1]),
      },
    )
