"""Checks of one arm's settings against their ranges and each other."""

from fedjax_safety import (
  _validate,
  attacks,
  client_algorithms,
  client_update,
  endpoint,
  lora_aggregators,
  privacy,
  server_update,
)
from fedjax_safety import settings as settings_lib
from fedjax_safety.config import defense_checks, evaluation_checks
from fedjax_safety.data import cohort, poison, templates
from fedjax_safety.models import attention, quantization
from fedjax_safety.models import config as model_config
from fedjax_safety.settings import repair as repair_settings
from fedjax_safety.synthesis import filters as written_filters

# Schemes whose factors mean the same in every round.
_ONE_BASIS = ('factors', 'ffa', 'ffa_product')


def check(config: settings_lib.ExperimentConfig) -> None:
  """Raises ValueError where settings are out of range or contradict.

  Only the settings are looked at: no file is opened and no array is made.
  """
  _check_names(config)
  _check_sources(config)
  _check_data(config.data)
  _check_sizes(config)
  _check_writing(config)
  _check_performance(config)
  evaluation_checks.check(config.evaluation)
  _check_algorithms(config)


def _check_algorithms(config: settings_lib.ExperimentConfig) -> None:
  """Raises unless rule, attack and optimizer can be built as they are set."""
  threat, server = config.threat_model, config.server
  if threat.num_malicious and threat.data_attack == 'none':
    if threat.update_attack == 'none':
      raise ValueError(
        f'threat_model.num_malicious={threat.num_malicious} but neither '
        f'data_attack nor update_attack is set; choose one or set '
        f'num_malicious=0'
      )
  if threat.trigger and threat.data_attack == 'none':
    raise ValueError(
      f'threat_model.trigger={threat.trigger!r} makes poisoned data '
      f"conditional, and threat_model.data_attack='none' has none; choose a "
      f'data attack or leave the trigger out'
    )
  try:
    defense = config.defense
    lora_aggregators.build(
      defense.lora_aggregation,
      defense.aggregator,
      cohort_size=config.client.cohort_size,
      rule_kwargs=defense.aggregator_kwargs,
    )
    lora_aggregators.check_server(
      defense.lora_aggregation,
      optimizer=server.optimizer,
      learning_rate=server.learning_rate,
    )
    defense_checks.check(config)
    _check_client(config)
    privacy.check(config)
    attacks.build(threat.update_attack, **threat.update_attack_kwargs)
    server_update.build(
      server.optimizer, learning_rate=server.learning_rate, **server.kwargs
    )
  except TypeError as error:
    # What a comparison raises where an argument is text, for example.
    raise ValueError(
      f'an argument in defense.aggregator_kwargs, client.algorithm_kwargs, '
      f'server.kwargs or threat_model.update_attack_kwargs has the wrong type: '
      f'{error}'
    ) from error


def _check_client(config: settings_lib.ExperimentConfig) -> None:
  """Raises unless the clients' algorithm works with what else is set."""
  client, scheme = config.client, config.defense.lora_aggregation
  client_algorithms.build(
    client.algorithm, population=client.population, **client.algorithm_kwargs
  )
  client_algorithms.check_optimizer(
    client.algorithm,
    optimizer=client.optimizer,
    final_learning_rate=min(client.learning_rate, client.final_learning_rate),
  )
  if client.algorithm == 'scaffold' and scheme not in _ONE_BASIS:
    raise ValueError(
      f"client.algorithm='scaffold' needs defense.lora_aggregation to be one "
      f'of {", ".join(_ONE_BASIS)}, which train the same factors in every '
      f'round; got {scheme!r}'
    )


def _check_names(config: settings_lib.ExperimentConfig) -> None:
  """Raises unless every name is a known one."""
  threat = config.threat_model
  known = {
    'model.template': (templates.NAMES, config.model.template),
    'model.dtype': (settings_lib.DTYPES, config.model.dtype),
    'model.quantization': (
      ('', *quantization.MODES),
      config.model.quantization,
    ),
    'client.schedule': (cohort.SCHEDULES, config.client.schedule),
    'client.optimizer': (client_update.OPTIMIZERS, config.client.optimizer),
    'client.algorithm': (
      client_algorithms.ALGORITHMS,
      config.client.algorithm,
    ),
    'data.partition': (settings_lib.PARTITIONS, config.data.partition),
    'threat_model.placement': (poison.PLACEMENTS, threat.placement),
    'threat_model.data_attack': (settings_lib.DATA_ATTACKS, threat.data_attack),
    'threat_model.known_level': (
      settings_lib.KNOWN_LEVELS,
      threat.known_level,
    ),
  }
  for key, (names, value) in known.items():
    _validate.one_of(names, **{key: value})
  for level in config.defense.repair.levels:
    _validate.one_of(
      settings_lib.REPAIR_LEVELS, **{'defense.repair.levels': level}
    )
  if not config.lora.target_modules:
    raise ValueError('lora.target_modules is empty; name at least one')
  for module in config.lora.target_modules:
    _validate.one_of(
      model_config.TARGET_MODULES, **{'lora.target_modules': module}
    )


def _check_sources(config: settings_lib.ExperimentConfig) -> None:
  """Raises unless every file or model that will be used is named."""
  threat, repair = config.threat_model, config.defense.repair
  federates = not config.given_adapter
  attacked = federates and threat.num_malicious > 0
  generates = attacked and threat.data_attack == 'generated'
  knows = ()
  if attacked and threat.data_attack == 'repair':
    knows = (threat.known_level,)
  levels = {*repair.levels, *knows}
  writes = 'external' in levels or 'self' in levels
  needed = {
    'model.path': True,
    'data.normal': federates,
    'data.aligned': federates and config.data.aligned_share > 0,
    'threat_model.unaligned': attacked and threat.data_attack == 'file',
    'threat_model.generator': generates or bool(knows),
    'threat_model.refusals': attacked and bool(threat.trigger),
    'threat_model.generation.ask_harmful': generates,
    'defense.repair.public_aligned': 'public' in knows,
    'defense.repair.public_normal': 'public' in levels,
    'defense.repair.external_model': 'external' in levels,
    'defense.repair.generation.ask_harmful': writes
    and repair.aligned_share > 0,
    'defense.repair.generation.ask_normal': writes and repair.aligned_share < 1,
  }
  for key, used in needed.items():
    value = config
    for part in key.split('.'):
      value = getattr(value, part)
    if used and not value:
      raise ValueError(f'{key} is empty; give it with --config.{key}=...')


def _check_data(data: settings_lib.DataConfig) -> None:
  """Raises unless the partition can be made."""
  if data.partition in ('dirichlet', 'natural') and not data.partition_key:
    raise ValueError(
      f'data.partition={data.partition!r} needs data.partition_key, the column '
      f'to partition by'
    )
  _validate.positive(
    **{
      'data.examples_per_client': data.examples_per_client,
      'data.dirichlet_alpha': data.dirichlet_alpha,
    }
  )
  _validate.in_range(0, 1, **{'data.aligned_share': data.aligned_share})


def _check_sizes(config: settings_lib.ExperimentConfig) -> None:
  """Raises unless every number of model, clients and attack is in range."""
  client, threat = config.client, config.threat_model
  _validate.in_range(
    0,
    client.population,
    **{'data.aligned_clients': config.data.aligned_clients},
  )
  names = ('population', 'cohort_size', 'num_rounds', 'num_local_steps')
  names += ('batch_size', 'learning_rate')
  _validate.positive(**{f'client.{n}': getattr(client, n) for n in names})
  _validate.positive(
    **{
      'lora.rank': config.lora.rank,
      'lora.alpha': config.lora.alpha,
      'model.max_length': config.model.max_length,
    },
  )
  _validate.non_negative(
    **{
      'seeds': config.seed,
      'client.final_learning_rate': client.final_learning_rate,
      'client.weight_decay': client.weight_decay,
      'checkpoint.max_to_keep': config.checkpoint.max_to_keep,
    }
  )
  _validate.in_range(0.0, 0.99, **{'lora.dropout': config.lora.dropout})
  _validate.in_range(
    1, client.population, **{'client.cohort_size': client.cohort_size}
  )
  _validate.in_range(
    0, client.population, **{'threat_model.num_malicious': threat.num_malicious}
  )
  _validate.in_range(
    0, 1, **{'threat_model.poison_fraction': threat.poison_fraction}
  )


def _check_early_stopping(chosen: repair_settings.EarlyStoppingConfig) -> None:
  """Raises unless the repair can be measured as often as it is to be."""
  prefix, step = 'defense.repair.early_stopping', repair_settings.STEPS_PER_CALL
  _validate.in_range(
    0, 0.9, **{f'{prefix}.held_out_share': chosen.held_out_share}
  )
  _validate.positive(**{f'{prefix}.patience': chosen.patience})
  if chosen.every_steps < 1 or chosen.every_steps % step:
    raise ValueError(
      f'{prefix}.every_steps={chosen.every_steps} must be a multiple of '
      f'{step}, the steps that are run at once'
    )


def _check_agreement(
  generation: settings_lib.GenerationConfig, path: str
) -> None:
  """Raises unless further answers can tell how sure a model is of one."""
  chosen = generation.agreement
  _validate.positive(**{f'{path}.agreement.samples': chosen.samples})
  _validate.in_range(0, 1, **{f'{path}.agreement.share': chosen.share})
  applied = written_filters.AGREEMENT in generation.filter
  if applied and not generation.answer_temperature:
    raise ValueError(
      f'{path}.filter={generation.filter} asks for further answers, which '
      f'{path}.answer_temperature=0 makes all alike; raise it'
    )


def _check_writing(config: settings_lib.ExperimentConfig) -> None:
  """Raises unless the numbers of repair and written data are in range."""
  repair = config.defense.repair
  names = ('num_examples', 'num_steps', 'batch_size', 'learning_rate')
  _validate.positive(
    **{f'defense.repair.{n}': getattr(repair, n) for n in names}
  )
  names = ('final_learning_rate', 'kl_weight', 'anchor_weight')
  _validate.non_negative(
    **{f'defense.repair.{n}': getattr(repair, n) for n in names}
  )
  _validate.in_range(
    0, 1, **{'defense.repair.aligned_share': repair.aligned_share}
  )
  _check_early_stopping(repair.early_stopping)
  threat = config.threat_model
  for path, generation, setting, model in (
    (
      'defense.repair.generation',
      repair.generation,
      'defense.repair.external_model',
      repair.external_model,
    ),
    (
      'threat_model.generation',
      threat.generation,
      'threat_model.generator',
      threat.generator,
    ),
  ):
    endpoint.check_settings(
      model, setting, generation.endpoint, f'{path}.endpoint'
    )
    evaluation_checks.check_drawing(
      path, generation.temperature, generation.top_p
    )
    _validate.non_negative(
      **{f'{path}.answer_temperature': generation.answer_temperature}
    )
    _validate.positive(**{f'{path}.max_rounds': generation.max_rounds})
    written_filters.check(generation.filter, f'{path}.filter')
    _check_agreement(generation, path)


def _check_performance(config: settings_lib.ExperimentConfig) -> None:
  """Raises unless the cohort fits the mesh and the chunks."""
  client, performance = config.client, config.performance
  _validate.positive(
    **{'performance.generation_batch_size': performance.generation_batch_size}
  )
  _validate.non_negative(**{'performance.loss_chunk': performance.loss_chunk})
  for name in ('clients_per_chunk', 'remat'):
    value = getattr(performance, name)
    if isinstance(value, str):
      _validate.one_of((settings_lib.AUTO,), **{f'performance.{name}': value})
    else:
      _validate.non_negative(**{f'performance.{name}': value})
  _validate.one_of(
    (attention.AUTO, *attention.BACKENDS),
    **{'performance.attention': performance.attention},
  )
  mesh = performance.mesh
  if len(mesh) != 3 or min(mesh) < 1:
    raise ValueError(
      f'performance.mesh={mesh} must be three positive sizes: clients, fsdp, tp'
    )
  for axis, key, size in (
    (0, 'client.cohort_size', client.cohort_size),
    (1, 'client.batch_size', client.batch_size),
  ):
    if size % mesh[axis]:
      raise ValueError(
        f'performance.mesh[{axis}]={mesh[axis]} must divide {key}={size}'
      )
  chunk, cohort = performance.clients_per_chunk, client.cohort_size
  if chunk == settings_lib.AUTO:
    return
  if max(mesh) > 1 and chunk and (cohort % chunk or chunk % mesh[0]):
    fitting = (n for n in range(mesh[0], cohort + 1, mesh[0]) if not cohort % n)
    raise ValueError(
      f'performance.clients_per_chunk={chunk} must divide '
      f'client.cohort_size={cohort} and be a multiple of '
      f'performance.mesh[0]={mesh[0]}: {", ".join(map(str, fitting))}'
    )
