"""A run, told from start to end: every arm, then the report."""

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fedjax_safety import arm as arm_lib
from fedjax_safety import (
  assembly,
  client_data,
  distributed,
  federation,
  inputs,
  interrupt,
  report,
  stages,
  workdir,
)
from fedjax_safety import config as config_lib
from fedjax_safety import metrics as metrics_lib
from fedjax_safety import settings as settings_lib
from fedjax_safety.data import overlap
from fedjax_safety.synthesis import written_data


def run(
  config: Mapping[str, Any],
  directory: str | pathlib.Path,
  *,
  allow_config_change: bool = False,
) -> pathlib.Path:
  """Runs or resumes every arm and seed of a config and writes the report.

  Args:
    config: a ConfigDict made from `config.default()`, or the same as a dict.
    directory: the work directory.
    allow_config_change: continue a run of another config; what is done of it
      stays as it is.

  Returns:
    The path of `report.html`.

  Raises:
    ValueError: the config, the data, a model or the directory is unusable;
      nothing has been compiled yet.
    interrupt.Interrupted: asked to stop; run again to resume.
  """
  root = pathlib.Path(directory)
  with arms_of(config, root, allow_config_change=allow_config_change) as arms:
    for arm in arms:
      run_arm(arm)
  return write_report(root)


@contextlib.contextmanager
def arms_of(
  config: Mapping[str, Any],
  root: pathlib.Path,
  *,
  allow_config_change: bool = False,
  skip: Callable[[pathlib.Path, settings_lib.ExperimentConfig], bool] = (
    lambda directory, experiment: False
  ),
) -> Iterator[list[arm_lib.Arm]]:
  """Makes a directory a config's, checks all inputs, and gives the arms.

  Metrics are written and requests to stop are heard until it is left.

  Args:
    config: as in `run`.
    root: the work directory.
    allow_config_change: as in `run`.
    skip: whether an arm, by its directory and settings, is left out.

  Raises:
    ValueError: as in `run`.
  """
  experiments = config_lib.resolve(config)
  distributed.on_first(
    workdir.check, root, config, allow_config_change=allow_config_change
  )
  wanted = {
    (name, seed): experiment
    for (name, seed), experiment in experiments.items()
    if not skip(workdir.arm_directory(root, name, seed), experiment)
  }
  choices = inputs.check(wanted, root)
  distributed.on_first(workdir.claim, root, config)
  if distributed.is_first():
    writer = metrics_lib.MetricsWriter(root / 'metrics.jsonl')
  else:
    writer = metrics_lib.NoMetrics()
  names = list(dict.fromkeys(name for name, _ in experiments))
  with writer, interrupt.StopRequest() as stop:
    arms = []
    for (name, seed), experiment in wanted.items():
      performance, why = choices[name, seed]
      settled = dataclasses.replace(experiment, performance=performance)
      arms.append(
        arm_lib.Arm(name, names.index(name), settled, root, writer, stop)
      )
      if why:
        _tell(arms[-1], why)
    yield arms


def _tell(arm: arm_lib.Arm, why: str) -> None:
  """Says what was chosen where the settings leave it open."""
  if distributed.is_first():
    print(f'{arm.name}: chose {why}', file=sys.stderr)
  arm.writer.write(
    {
      'kind': 'choice',
      'arm': arm.name,
      'seed': arm.config.seed,
      'performance/clients_per_chunk': arm.config.performance.clients_per_chunk,
      'performance/remat': arm.config.performance.remat,
      'performance/why': why,
    }
  )


def write_report(root: pathlib.Path) -> pathlib.Path:
  """Writes the report of a run and returns the path of its page."""
  distributed.on_first(lambda: str(report.build(root)['html']))
  return root / 'report.html'


def run_arm(arm: arm_lib.Arm) -> None:
  """Federates, measures, repairs at each level and measures again."""
  config, unaligned, clients = arm.config, [], {}
  if not config.given_adapter:
    honest = client_data.honest_clients(config)
    unaligned = written_data.attack_data(arm, honest)
    clients = client_data.poisoned(config, honest, unaligned)

  def federate():
    if config.given_adapter:
      return stages.given_adapter(config)
    return federation.federate(
      config,
      assembly.tuned_model(config),
      client_data.encode_clients(config, clients),
      arm=arm.name,
      directory=arm.directory / 'checkpoints',
      writer=arm.writer,
      stop=arm.stop,
      measure=stages.round_measure(arm),
    )

  adapter = stages.saved_adapter(arm, 'federated', federate)
  label = config.label or arm.name
  stages.evaluate(arm, 'federated', label, adapter)
  for level in config.defense.repair.levels:
    stage = f'repair_{level}'
    repaired = stages.saved_adapter(
      arm, stage, lambda level=level: stages.repair(arm, level, adapter)
    )
    stages.evaluate(arm, stage, f'{label}; repaired, {level}', repaired)
  sets = written_data.audit_sets(arm, unaligned)
  distributed.on_first(
    workdir.write_json, arm.directory / 'audit.json', overlap.audit(sets)
  )
