"""Aliases for what travels between the parts, and the dimension key.

A client is a row of an array: in a stacked tree every leaf has the clients of
the round on its leading axis.

Dimension key, used in every comment and docstring of the package:
  N  clients in the population
  C  clients in the cohort of one round
  S  local optimizer steps of one client in one round
  B  examples in one batch
  L  tokens in one sequence
  V  entries in the vocabulary
  D  width of the residual stream
  H  attention heads
  K  width of one head
  F  width of the MLP
  R  rank of a LoRA adapter
  P  parameters in one adapter, all leaves together
"""

from typing import Any, TypeAlias

import jax

# Any nesting of dicts, tuples and lists with arrays as leaves.
PyTree: TypeAlias = Any

# One client's or the server's trainable LoRA tree: leaves [...], P in all.
Adapter: TypeAlias = PyTree

# The frozen weights of the language model.
BaseParams: TypeAlias = PyTree

# Client adapter minus server adapter for each client: leaves [C, ...].
Deltas: TypeAlias = PyTree

# How much each client counts: [C] float32, at least 0.
Weights: TypeAlias = jax.Array

# Truth per row, known to the simulation and never to an aggregator: [C] bool.
RowMask: TypeAlias = jax.Array

# A typed key from `jax.random.key`.
PRNGKey: TypeAlias = jax.Array

# Whatever an aggregator carries from one round to the next.
AggregatorState: TypeAlias = PyTree

# Name of a measured scalar -> scalar array.
Metrics: TypeAlias = dict[str, jax.Array]
