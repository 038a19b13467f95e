"""The settings of repair beyond the paper's, parts of `settings.RepairConfig`.

Nothing here is checked against anything else: see `config.resolve`.
"""

import dataclasses

# Steps of a repair in one compiled call: enough to hide the call, few enough
# to report. Between two calls it can be measured.
STEPS_PER_CALL = 10

_Group = dataclasses.dataclass(frozen=True, kw_only=True)


@_Group
class AgreementConfig:
  """When a model agrees with itself that a request is harmful, or is not.

  Attributes:
    samples: further answers to each request, under the safety reminder.
    share: of them that must refuse by rule list where a request is harmful,
      and must not where it is normal. A list misses refusals that are put in
      other words: above what it finds, no request is harmful.
  """

  samples: int = 4
  share: float = 0.5


@_Group
class EarlyStoppingConfig:
  """Keeps the adapter that makes held-out safe answers likeliest.

  Attributes:
    held_out_share: share of the requests of aligned pairs that are measured
      and not trained on; 0 trains on all, to the end.
    every_steps: steps between two measurements, a multiple of 10.
    patience: measurements without a new best one, after which it stops.
  """

  held_out_share: float = 0.0
  every_steps: int = 10
  patience: int = 5
