"""What a round will cost on devices that need not be at hand.

The round that a run would compile is compiled ahead of time, from shapes
alone: its memory on each device, its operations, what goes between devices,
and the least time that a device can take for it.
"""

import dataclasses
import math

from fedjax_safety import settings as settings_lib
from fedjax_safety.plan import cost, fit, settle, shapes, topology
from fedjax_safety.plan.cost import Plan
from fedjax_safety.plan.text import as_json, table

__all__ = ['Plan', 'as_json', 'plan', 'table']


def plan(
  config: settings_lib.ExperimentConfig,
  *,
  shape: str | None = None,
  topology_name: str | None = None,
  search: bool = False,
  memory_gib: float | None = None,
) -> Plan:
  """Returns what a round of an arm costs.

  Nothing is downloaded, no weight is read and nothing runs on a device.

  Args:
    config: the arm's settings. Of the model only `config.json` is read.
    shape: a name in `shapes.SHAPES` instead of that file.
    topology_name: a TPU slice, such as `v5e:4x4`; None for the devices at
      hand.
    search: propose a mesh of all devices, a chunk of clients and whether to
      recompute, instead of taking those of the settings.
    memory_gib: memory of a device, if not what is known of its kind.

  Raises:
    ValueError: libtpu is missing, a name is unknown, or the sizes do not fit
      each other.
  """
  model = shapes.decoder_config(config.model, shape)
  devices = topology.devices(topology_name)
  memory = None if memory_gib is None else int(memory_gib * topology.GIB)
  if search:
    measure = fit.propose
  else:
    measure = cost.measure
    limit = memory or cost.limit_of(
      devices[0], math.prod(config.performance.mesh)
    )
    choice = settle.choose(config, model, devices[0], limit)
    config = dataclasses.replace(config, performance=choice.performance)
  return measure(
    config,
    model,
    devices,
    at_hand=topology_name is None,
    memory=memory,
  )
