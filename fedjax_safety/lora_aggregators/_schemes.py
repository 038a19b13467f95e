"""Published ways to average LoRA adapters, as functions of stacked adapters.

What would be right is the mean of the products, and the mean of the factors
is not it: `mean(a @ b) - mean(a) @ mean(b)` is the clients' covariance of a
and b, which is 0 only where all clients share one factor. Each scheme answers
this in its own way. All count a row with a NaN or an infinity as absent.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fedjax_safety import lora, tree, types
from fedjax_safety.aggregators import _base
from fedjax_safety.lora_aggregators import _lowrank


def shares(
  adapters: types.PyTree, weights: types.Weights | None
) -> types.Weights:
  """Returns weights [C] that sum to 1, 0 where weight or row is not usable."""
  return _base.shares(weights, tree.finite_rows(adapters))


def fedit(
  adapters: types.PyTree, *, weights: types.Weights | None = None
) -> types.Adapter:
  """Returns the factors averaged apart.

  Its product differs from the mean product by the covariance of the factors,
  `sum_{k<l} p_k p_l (a_k - a_l) @ (b_k - b_l)`.

  Args:
    adapters: stacked adapters, leaves [C, ...].
    weights: [C], at least 0; None counts all clients alike.

  Reference: Zhang et al. Towards Building the Federated GPT: Federated
  Instruction Tuning. ICASSP 2024.
  """
  return tree.mix(shares(adapters, weights), adapters)


def ffa_trainable(
  adapter: types.Adapter, round_index: jax.Array | int = 0
) -> types.PyTree:
  """Returns a tree of bools: only `b` may change, in every round."""
  del round_index
  return _lowrank.map_pairs(lambda _: {'a': False, 'b': True}, adapter)


def rolora_trainable(
  adapter: types.Adapter, round_index: jax.Array | int
) -> types.PyTree:
  """Returns a tree of bools: `b` in rounds 0, 2, ..., `a` in 1, 3, ....

  A fresh adapter has b = 0, and then a has no gradient: b must go first.
  """
  even = jnp.asarray(round_index) % 2 == 0
  return _lowrank.map_pairs(lambda _: {'a': ~even, 'b': even}, adapter)


def _average_trained(adapter, adapters, trainable, weights):
  """Averages what was trained; the rest is the server's, whatever was sent."""
  deltas = jax.tree.map(
    lambda rows, own: rows.astype(jnp.float32) - own, adapters, adapter
  )
  # Frozen first, so that a bad value in what nobody reads spoils no client.
  deltas = tree.keep_leaves(trainable, deltas)
  delta = tree.mix(shares(deltas, weights), deltas)
  return jax.tree.map(
    lambda own, change: (own + change).astype(own.dtype), adapter, delta
  )


def ffa(
  adapter: types.Adapter,
  adapters: types.PyTree,
  *,
  weights: types.Weights | None = None,
) -> types.Adapter:
  """Returns the server's `a` and the mean of the clients' `b`.

  Exact: with one `a` for all, the product of the means is the mean product.
  Clients must train with `ffa_trainable`.

  Args:
    adapter: the server's adapter.
    adapters: stacked adapters, leaves [C, ...]; their `a` is not looked at.
    weights: [C], at least 0; None counts all clients alike.

  Reference: Sun, Li, Li, Ding. Improving LoRA in Privacy-preserving Federated
  Learning. ICLR 2024.
  """
  return _average_trained(adapter, adapters, ffa_trainable(adapter), weights)


def rolora(
  adapter: types.Adapter,
  adapters: types.PyTree,
  round_index: jax.Array | int,
  *,
  weights: types.Weights | None = None,
) -> types.Adapter:
  """Returns the mean of the factor that this round trained.

  Exact in every round, as the other factor is the server's for all. Clients
  must train with `rolora_trainable`.

  Args:
    adapter: the server's adapter.
    adapters: stacked adapters, leaves [C, ...]; of the frozen factor nothing
      is looked at.
    round_index: rounds done before this one.
    weights: [C], at least 0; None counts all clients alike.

  Reference: Chen, Guo, Ju, Dalal, Zhu, Khisti. Robust Federated Finetuning of
  LLMs via Alternating Optimization of LoRA. NeurIPS 2025.
  """
  trainable = rolora_trainable(adapter, round_index)
  return _average_trained(adapter, adapters, trainable, weights)


def fedsa(
  adapters: types.PyTree, *, weights: types.Weights | None = None
) -> types.PyTree:
  """Returns every client's next adapter: the mean `a` and its own `b`.

  Args:
    adapters: stacked adapters, leaves [C, ...].
    weights: [C], at least 0; None counts all clients alike.

  Returns:
    Stacked adapters, leaves [C, ...].

  Reference: Guo, Zeng, Wang, Fan, Wang, Qu. Selective Aggregation for
  Low-Rank Adaptation in Federated Learning. ICLR 2025.
  """
  mean = fedit(adapters, weights=weights)
  return _lowrank.map_pairs(
    lambda mean, own: {
      'a': jnp.broadcast_to(mean['a'], own['a'].shape),
      'b': own['b'],
    },
    mean,
    adapters,
  )


def flora(
  adapters: types.PyTree, *, weights: types.Weights | None = None
) -> types.Adapter:
  """Returns the stack of the clients' factors: the mean product, exactly.

  `lora.merge(base_params, stack, scale)` adds it to the base, as the paper's
  clients do before they start from a fresh adapter.

  Example:
    >>> import jax.numpy as jnp
    >>> from fedjax_safety import lora_aggregators
    >>> a, b = jnp.ones((2, 1, 5, 3)), jnp.ones((2, 1, 3, 4))
    >>> stack = lora_aggregators.flora({'q_proj': {'a': a, 'b': b}})
    >>> print(stack['q_proj']['a'].shape, stack['q_proj']['b'].shape)
    (1, 5, 6) (1, 6, 4)

  Args:
    adapters: stacked adapters of rank R, leaves [C, ...].
    weights: [C], at least 0; None counts all clients alike.

  Returns:
    An adapter of rank C R; the weights are in `b`.

  Reference: Wang et al. FLoRA: Federated Fine-Tuning Large Language Models
  with Heterogeneous Low-Rank Adaptations. NeurIPS 2024.
  """
  counts = shares(adapters, weights)

  def stack(pair):
    stacked = {
      'a': _lowrank.side_by_side(_lowrank.used_rows(counts, pair['a'])),
      'b': _lowrank.on_top(_lowrank.scale_rows(counts, pair['b'])),
    }
    return _lowrank.like(stacked, pair)

  return _lowrank.map_pairs(stack, adapters)


def flexlora(
  adapters: types.PyTree, *, rank: int, weights: types.Weights | None = None
) -> types.Adapter:
  """Returns the best approximation of the mean product at a rank.

  `at_ranks` cuts it to each client's own rank, where it is the best too.

  Args:
    adapters: stacked adapters, leaves [C, ...].
    rank: of the result, the largest that any client uses.
    weights: [C], at least 0; None counts all clients alike.

  Returns:
    An adapter, as `refactor` makes it.

  Reference: Bai, Chen, Qian, Yao, Li. Federated Fine-tuning of Large Language
  Models under Heterogeneous Tasks and Client Resources. NeurIPS 2024.
  """
  wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), adapters)
  nearest = _lowrank.refactor(flora(wide, weights=weights), rank=rank)
  return _lowrank.map_pairs(_lowrank.like, nearest, adapters)


def fedex(
  adapters: types.PyTree, *, weights: types.Weights | None = None
) -> tuple[types.Adapter, types.Adapter]:
  """Returns the averaged factors and what their product lacks.

  The residual has rank C R, never its full size. The clients' next model is
  `lora.merge(base_params, residual, scale)` with the averaged adapter, whose
  sum is the mean product exactly; `refactor(residual, rank=...)` is the
  paper's truncated variant.

  Args:
    adapters: stacked adapters, leaves [C, ...].
    weights: [C], at least 0; None counts all clients alike.

  Returns:
    The adapter of `fedit`, and the residual as an adapter.

  Reference: Singhal, Ponkshe, Vepakomma. FedEx-LoRA: Exact Aggregation for
  Federated and Efficient Fine-Tuning of Large Language Models. ACL 2025.
  """
  counts = shares(adapters, weights)
  wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), adapters)
  mean = tree.mix(counts, wide)
  # Relative to the mean: what all clients share would only be rounded.
  lacking = residual(jax.tree.map(jnp.subtract, wide, mean), counts)
  return tuple(
    _lowrank.map_pairs(_lowrank.like, made, adapters)
    for made in (mean, lacking)
  )


def residual(deltas: types.Deltas, coefficients: jax.Array) -> types.Adapter:
  """Returns what combined factors lack of the combined products.

  With `new = adapter + mix(coefficients, deltas)`, the product of `new` and
  the residual's add up to the product of `adapter` and the combination of the
  clients' changes of it. The adapter itself cancels out.

  Args:
    deltas: stacked deltas, leaves [C, ...].
    coefficients: [C], of any sum.

  Returns:
    A float32 adapter of rank C R.
  """
  mean = tree.mix(
    coefficients, jax.tree.map(lambda d: d.astype(jnp.float32), deltas)
  )

  def lacking(pair, mean):
    b = pair['b'].astype(jnp.float32) - mean['b']
    return {
      'a': _lowrank.side_by_side(_lowrank.used_rows(coefficients, pair['a'])),
      'b': _lowrank.on_top(_lowrank.scale_rows(coefficients, b)),
    }

  return _lowrank.map_pairs(lacking, deltas, mean)


def hetlora(
  adapters: types.PyTree, *, weights: types.Weights | None = None
) -> types.Adapter:
  """Returns the factors averaged apart, by the norms of the products.

  Adapters of small rank, zero-padded, then count less. `weights` multiply the
  norms.

  Args:
    adapters: stacked adapters, leaves [C, ...]; `stack_ranks` makes them.
    weights: [C], at least 0; None counts all clients alike.

  Reference: Cho, Liu, Xu, Fahrezi, Joshi. Heterogeneous LoRA for Federated
  Fine-tuning of On-Device Foundation Models. EMNLP 2024.
  """
  norms = _lowrank.product_norms(adapters)
  return fedit(adapters, weights=norms if weights is None else norms * weights)


def stack_ranks(adapters: Sequence[types.Adapter]) -> types.PyTree:
  """Zero-pads adapters to the largest rank among them and stacks them.

  Args:
    adapters: one adapter a client, all for the same kernels.

  Returns:
    Stacked adapters, leaves [C, ...]; no product has changed.
  """
  rank = max(_lowrank.pairs(one)[0]['a'].shape[-1] for one in adapters)
  padded = [lora.pad_rank(one, rank) for one in adapters]
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *padded)


def at_ranks(adapter: types.Adapter, ranks: jax.Array) -> types.PyTree:
  """Returns each client's adapter: the first columns, as many as its rank.

  Args:
    adapter: the server's adapter.
    ranks: int[C], the clients' ranks; may be traced.

  Returns:
    Stacked adapters of the server's rank, leaves [C, ...], 0 beyond each
    client's own.
  """

  def cut(pair, rank):
    kept = jnp.arange(pair['a'].shape[-1]) < rank
    return {
      'a': jnp.where(kept, pair['a'], 0),
      'b': jnp.where(kept[:, None], pair['b'], 0),
    }

  return jax.vmap(
    lambda rank: _lowrank.map_pairs(lambda pair: cut(pair, rank), adapter)
  )(jnp.asarray(ranks))
