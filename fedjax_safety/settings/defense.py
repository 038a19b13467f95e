"""The settings of defenses in the rounds, a part of `settings.DefenseConfig`.

Nothing here is checked against anything else: see `config.resolve`.
"""

import dataclasses

_Group = dataclasses.dataclass(frozen=True, kw_only=True)


@_Group
class ProbeConfig:
  """Pairs that the server holds, on which it tests the clients' deltas.

  Attributes:
    source: harmful requests with safe answers, a file or `demo_world:public`;
      needed by the rules safety_probe and zeno, and by clients that follow
      lisa, which are sent `num_training_pairs` of them.
    num_pairs: how many, drawn from those that no evaluation set asks.
    num_tokens: first tokens of an answer that count, by which a model has
      mostly decided whether it refuses; 0 counts the whole answer.
    normal: normal pairs, and
    unaligned: harmful requests with direct answers: with `source` they teach
      the rule update_probe what clients' deltas look like.
    num_training_pairs: how many of each of the three.
    num_references: deltas that the server makes of each of them in a round.
  """

  source: str = ''
  num_pairs: int = 16
  num_tokens: int = 4
  normal: str = ''
  unaligned: str = ''
  num_training_pairs: int = 200
  num_references: int = 3


@_Group
class SafeLoraConfig:
  """Projection of the server's adapter onto a safety subspace, every round.

  Attributes:
    aligned_model: a model that was aligned, and
    base_model: the same before that, whose differences span the subspace; ''
      as aligned model projects nothing, as base model it is `model.path`.
    rank: directions of the subspace, of each adapted matrix.
    threshold: share of a matrix's length that must lie within; one with less
      is projected.
  """

  aligned_model: str = ''
  base_model: str = ''
  rank: int = 16
  threshold: float = 0.5
