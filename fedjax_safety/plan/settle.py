"""What `auto` stands for in a run's settings, and whether the run fits.

Told from sizes alone, before any weight is read. The arithmetic rather says
too much, so a round that it finds too large is compiled to be sure.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from fedjax_safety import distributed
from fedjax_safety import settings as settings_lib
from fedjax_safety.models import attention, sharding
from fedjax_safety.models import config as model_config
from fedjax_safety.plan import cost, fit, shapes, topology

# Of a device's memory, what the arithmetic may fill.
_FILLED = 0.9

_REMEDY = (
  'set performance.remat=true, fewer performance.clients_per_chunk, a smaller '
  'client.batch_size or model.max_length, or a larger performance.mesh; '
  '`fedjax-safety plan --fit` proposes what fits'
)


class Choice(NamedTuple):
  """Settings without `auto`, and why these; empty if nothing was left open."""

  performance: settings_lib.PerformanceConfig
  why: str


def _gib(count: float) -> str:
  """Returns bytes in GiB, to three digits."""
  return f'{count / topology.GIB:.3g} GiB'


def _options(
  config: settings_lib.ExperimentConfig,
) -> dict[str, list[Any]]:
  """Returns what each setting left open may be, the present defaults first."""
  performance, cohort = config.performance, config.client.cohort_size
  step = performance.mesh[0]
  chunks = [n for n in range(step, cohort, step) if cohort % n == 0]
  options = {'remat': [False, True], 'clients_per_chunk': [0, *chunks[::-1]]}
  return {
    name: values
    for name, values in options.items()
    if getattr(performance, name) == settings_lib.AUTO
  }


def _candidates(
  performance: settings_lib.PerformanceConfig, options: dict[str, list[Any]]
) -> Iterator[settings_lib.PerformanceConfig]:
  """Yields the settings with every combination of the options."""
  for values in itertools.product(*options.values()):
    chosen = dict(zip(options, values, strict=True))
    yield dataclasses.replace(performance, **chosen)


def choose(
  config: settings_lib.ExperimentConfig,
  model: model_config.DecoderConfig,
  device: jax.Device,
  limit: int | None,
) -> Choice:
  """Returns the fastest settings whose round is thought to fit a device.

  On a CPU, and where the memory is not known, those are the defaults.

  Args:
    config: the arm's settings.
    model: the model's sizes.
    device: one of those the round will run on.
    limit: its memory in bytes, if known.
  """
  options = _options(config)
  if not options:
    return Choice(config.performance, '')
  made = list(_candidates(config.performance, options))
  if device.platform == 'cpu' or limit is None:
    chosen, why = made[0], 'the default: only accelerators are chosen for'
  else:
    found = [fit.estimate(config, model, device, each) for each in made]
    fitting = [each for each in found if each.memory <= _FILLED * limit]
    # Of equals the first, which is nearest to the defaults.
    best = min(fitting, key=lambda each: each.seconds, default=None)
    best = best or min(found, key=lambda each: each.memory)
    chosen = best.performance
    why = (
      f'thought to need {_gib(best.memory)} of {_gib(limit)} on '
      f'{device.device_kind}, the {"fastest" if fitting else "least"} of '
      f'{len(made)}'
    )
  values = ', '.join(f'{name}={getattr(chosen, name)}' for name in options)
  return Choice(chosen, f'{values}: {why}')


def _check_memory(
  config: settings_lib.ExperimentConfig,
  model: model_config.DecoderConfig,
  device: jax.Device,
  limit: int,
) -> None:
  """Raises unless a device holds its part of the model and of a round."""
  mesh = config.performance.mesh
  has = f'a device ({device.device_kind}) has {_gib(limit)}'
  held = fit.base_share(config, model)
  if held > limit:
    raise ValueError(
      f'model.path={config.model.path!r} in {config.model.dtype} has frozen '
      f'weights of {_gib(held)} for each device under '
      f'performance.mesh={mesh}, but {has}: split it over more devices '
      f'by fsdp or tp, or keep it in 8 bits (model.quantization)'
    )
  thought = fit.estimate(config, model, device, config.performance)
  if config.given_adapter or thought.memory <= limit:
    return
  plan = cost.measure(config, model, jax.devices(), at_hand=True, memory=limit)
  if not plan.fits:
    raise ValueError(
      f'a round takes {_gib(plan.memory.total)} of each device, '
      f'{_gib(held)} of it frozen weights, but {has}: {_REMEDY}'
    )


def _memory_of(device: jax.Device, sharing: int) -> int | None:
  """Returns the bytes that a program may use of a device at hand, if known."""
  if device.platform != 'cpu':
    # What JAX took of it can be less than what the chip has.
    stats = device.memory_stats() or {}
    if 'bytes_limit' in stats:
      return stats['bytes_limit']
  return cost.limit_of(device, sharing)


def settle(config: settings_lib.ExperimentConfig) -> Choice:
  """Returns an arm's settings without `auto`, or refuses what cannot run.

  Of the model only `config.json` is read.

  Args:
    config: the arm's settings.

  Raises:
    ValueError: the mesh does not divide the model, the attention that is
      asked for cannot run, or the model or a round is larger than memory; the
      message has the numbers and what to change.
  """
  model = shapes.decoder_config(config.model, None)
  mesh, device = config.performance.mesh, jax.local_devices()[0]
  sharding.check_divisible(
    model, jax.sharding.AbstractMesh(mesh, sharding.AXES)
  )
  attention.choose(
    config.performance.attention,
    model,
    device,
    tp=mesh[2],
    length=config.model.max_length,
  )
  # The first process's, so that all choose the same.
  limit = distributed.on_first(_memory_of, device, math.prod(mesh))
  choice = choose(config, model, device, limit)
  if limit is not None:
    settled = dataclasses.replace(config, performance=choice.performance)
    _check_memory(settled, model, device, limit)
  return choice
