"""What a step of the repair lowers: the paper's loss, and what it adds to it.

Two terms keep the repaired model near the attacked one on normal data, and
leave aligned data alone: the divergence of its predictions, and the distance
of its last hidden states, in the manner of Safety Anchor.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax

from fedjax_safety import assembly, losses, types
from fedjax_safety import settings as settings_lib
from fedjax_safety.models import decoder


class Frozen(NamedTuple):
  """What the repair does not change.

  Attributes:
    base_params: of the model.
    attacked: the aggregated adapter that is repaired.
  """

  base_params: types.BaseParams
  attacked: types.Adapter


class Batch(NamedTuple):
  """Examples of one step, or with one more axis in front, of several.

  Attributes:
    tokens: `int32[B, L]`.
    loss_mask: `[B, L]`, nonzero on answer tokens.
    is_normal: `bool[B]`, whether a pair is normal, not aligned.
  """

  tokens: jax.Array
  loss_mask: jax.Array
  is_normal: jax.Array


# (frozen, adapter, batch, key) -> (loss, its parts by name)
RepairLoss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


@functools.lru_cache(maxsize=4)
def make(
  model: decoder.Decoder,
  loss_chunk: int = 0,
  *,
  kl_weight: float = 0.0,
  anchor_weight: float = 0.0,
) -> RepairLoss:
  """Returns the loss of the repair; without weights it is that of training.

  The same arguments give the same function, so that what was compiled with it
  is found again.

  Args:
    model: the decoder that trains, on one device.
    loss_chunk: `performance.loss_chunk`.
    kl_weight: of the mean KL divergence of the attacked model's predictions
      from the repaired one's, over the answers of normal pairs.
    anchor_weight: of the mean squared distance of the states behind them.
  """
  plain = assembly.make_loss(model, loss_chunk)

  def loss_alone(frozen, adapter, batch, key):
    data = (batch.tokens, batch.loss_mask, key)
    return plain(frozen.base_params, adapter, *data), {}

  def loss_with_terms(frozen, adapter, batch, key):
    def states(adapter, rngs):
      variables = {'params': frozen.base_params, 'lora': adapter}
      return model.apply(variables, batch.tokens, rngs=rngs, head_apart=True)

    x, head = states(adapter, {'dropout': key} if model.lora_dropout else None)
    before, _ = states(frozen.attacked, None)
    normal = batch.loss_mask * batch.is_normal[:, None]
    chunked = {
      'chunk': loss_chunk or losses.chunk_of(head.shape[1], x[..., 0].size),
      'to_logits': functools.partial(decoder.to_logits, model.config),
    }
    loss = losses.chunked_next_token_loss(
      x, head, batch.tokens, batch.loss_mask, **chunked
    )
    parts = {'answers': loss}
    if kl_weight:
      parts['kl'] = losses.chunked_divergence(
        x, before, head, normal, **chunked
      )
      loss += kl_weight * parts['kl']
    if anchor_weight:
      parts['anchor'] = losses.hidden_distance(x, before, normal)
      loss += anchor_weight * parts['anchor']
    return loss, parts

  return loss_with_terms if kl_weight or anchor_weight else loss_alone


def of(config: settings_lib.ExperimentConfig) -> RepairLoss:
  """Returns the loss that an arm's settings ask for."""
  repair = config.defense.repair
  return make(
    assembly.make_decoder(assembly.tuned_model(config), config),
    config.performance.loss_chunk,
    kl_weight=repair.kl_weight,
    anchor_weight=repair.anchor_weight,
  )
