"""Checks of what defends in the rounds, and of what the server must hold."""

from fedjax_safety import _validate, aggregators, client_algorithms
from fedjax_safety import settings as settings_lib

# Inputs of a rule for which a server needs pairs of its own: to test deltas
# on, and to make deltas of.
_TESTED, _TRAINED = frozenset({'probe', 'loss_fn'}), frozenset({'references'})
# Sources of the references; the last one gives the unsafe ones.
KINDS = ('source', 'normal', 'unaligned')
# Rules with a history of each row, which is a client only if all take part.
_REMEMBER_ROWS = ('fldetector', 'foolsgold_history')


def check(config: settings_lib.ExperimentConfig) -> None:
  """Raises ValueError unless the rule has all inputs and numbers are sound."""
  _check_rule(config)
  safe_lora = config.defense.safe_lora
  _validate.positive(**{'defense.safe_lora.rank': safe_lora.rank})
  _validate.in_range(
    0, 1, **{'defense.safe_lora.threshold': safe_lora.threshold}
  )
  for name in ('num_pairs', 'num_training_pairs', 'num_references'):
    value = getattr(config.defense.probe, name)
    _validate.positive(**{f'defense.probe.{name}': value})
  _validate.non_negative(
    **{'defense.probe.num_tokens': config.defense.probe.num_tokens}
  )


def tests_deltas(config: settings_lib.ExperimentConfig) -> bool:
  """Whether an arm's rule tests deltas on pairs that the server holds."""
  return bool(_TESTED & aggregators.inputs(config.defense.aggregator))


def makes_references(config: settings_lib.ExperimentConfig) -> bool:
  """Whether an arm's rule compares with deltas that the server makes."""
  return bool(_TRAINED & aggregators.inputs(config.defense.aggregator))


def probe_sources(config: settings_lib.ExperimentConfig) -> tuple[str, ...]:
  """Returns the settings of `defense.probe` that must name a source."""
  if makes_references(config):
    return KINDS
  sends = client_algorithms.sends_pairs(config.client.algorithm)
  return KINDS[:1] if sends or tests_deltas(config) else ()


def _check_rule(config: settings_lib.ExperimentConfig) -> None:
  """Raises unless a round gives the rule all that it works on."""
  name, client = config.defense.aggregator, config.client
  for kind in probe_sources(config):
    if not getattr(config.defense.probe, kind):
      what = f'defense.aggregator={name!r} judges deltas by'
      if not tests_deltas(config) and not makes_references(config):
        what = f'client.algorithm={client.algorithm!r} sends clients'
      raise ValueError(
        f'{what} pairs that the server holds; give them with '
        f'--config.defense.probe.{kind}=...'
      )
  given = {'key', 'weights', 'adapter'} | _TESTED | _TRAINED
  missing = aggregators.inputs(name) - given
  if missing:
    raise ValueError(
      f'defense.aggregator={name!r} needs {", ".join(sorted(missing))} from '
      f'the server, which a run does not have; choose another rule, or call '
      f'aggregators.{name} from Python'
    )
  if name in _REMEMBER_ROWS and client.cohort_size != client.population:
    raise ValueError(
      f'defense.aggregator={name!r} remembers every row, so that rows must be '
      f'the same clients in every round; set client.cohort_size='
      f'{client.cohort_size} to client.population={client.population}'
    )
