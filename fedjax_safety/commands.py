"""What each subcommand does, given its parsed flags."""

import dataclasses
import importlib
import json
import pathlib
import sys
from typing import Any

import jax
from absl import flags

from fedjax_safety import (
  _validate,
  assembly,
  distributed,
  experiment,
  federation,
  report,
  workdir,
)
from fedjax_safety import checkpoint as checkpoint_lib
from fedjax_safety import config as config_lib
from fedjax_safety import plan as plan_lib
from fedjax_safety import settings as settings_lib
from fedjax_safety import sweep as sweep_lib
from fedjax_safety.config import evaluation_checks
from fedjax_safety.data import catalog
from fedjax_safety.evaluation import calibration, labels, rules
from fedjax_safety.evaluation import inputs as evaluation_inputs
from fedjax_safety.models import export as export_lib
from fedjax_safety.models import load
from fedjax_safety.settings import endpoint as endpoint_settings
from fedjax_safety.settings import evaluation as evaluation_settings

Flags = flags.FlagValues

# Exit code of a plan that does not fit the devices.
DOES_NOT_FIT = 3


def _done(html: pathlib.Path) -> None:
  """Prints the table of a finished run and where its files are."""
  print(f'\n{report.terminal_table(html.parent)}\n\nReport: {html}')


def _join(values: Flags) -> None:
  """Joins the other processes that the flags or the environment name."""
  distributed.initialize(
    coordinator=values.coordinator,
    num_processes=values.num_processes,
    process_id=values.process_id,
    detect=values.distributed,
  )


def run(values: Flags) -> None:
  """Runs a config, or resumes it."""
  _join(values)
  html = experiment.run(
    values.config,
    values.workdir,
    allow_config_change=values.allow_config_change,
  )
  if distributed.is_first():
    _done(html)


def sweep(values: Flags) -> None:
  """Runs a table, or what is left of it, and holds it beside the paper's."""
  _join(values)
  html, failures = sweep_lib.run(
    values.config,
    values.workdir,
    allow_config_change=values.allow_config_change,
  )
  if distributed.is_first():
    _done(html)
  if failures:
    raise ValueError(
      f'{len(failures)} of the arms failed and will be tried again by the '
      f'same command: {"; ".join(failures)}'
    )


def _start_from(config: dict[str, Any], adapter: str | None) -> None:
  """Makes a config measure one adapter instead of federating its arms'."""
  config['arms'] = []
  config['paper'] = {}
  config['given_adapter'] = adapter or settings_lib.NO_ADAPTER
  config['label'] = 'given adapter' if adapter else 'bare base'


def evaluate(values: Flags) -> None:
  """Measures an adapter, or the base, with a config's evaluation."""
  _start_from(values.config, values.adapter)
  values.config['defense']['repair']['levels'] = []
  run(values)


def repair(values: Flags) -> None:
  """Repairs an adapter at a config's levels, measured before and after."""
  _start_from(values.config, values.adapter)
  settings = values.config['defense']['repair']
  settings['levels'] = values.level or settings['levels']
  if not settings['levels']:
    raise ValueError(
      'the config repairs at no level; give --level=public, external or self'
    )
  run(values)


def write_report(values: Flags) -> None:
  """Writes the report of a run anew from its files."""
  _done(report.build(values.workdir)['html'])


def _chosen(
  values: Flags,
) -> tuple[settings_lib.ExperimentConfig, pathlib.Path]:
  """Returns the settings and the directory of one arm of a run."""
  root = pathlib.Path(values.workdir)
  experiments = config_lib.resolve(workdir.read_config(root))
  arms = list(dict.fromkeys(arm for arm, _ in experiments))
  arm = values.arm or arms[0]
  seed = next(iter(experiments))[1] if values.seed is None else values.seed
  if (arm, seed) not in experiments:
    raise ValueError(
      f'{root} has no arm {arm!r} at seed {seed}; it has '
      f'{", ".join(f"{a} at {s}" for a, s in experiments)}'
    )
  # One device is enough here, and the run's may not be at hand.
  config = experiments[arm, seed]
  performance = dataclasses.replace(config.performance, mesh=(1, 1, 1))
  config = dataclasses.replace(config, performance=performance)
  return config, workdir.arm_directory(root, arm, seed)


def _adapter(values: Flags) -> tuple[settings_lib.ExperimentConfig, Any]:
  """Returns the settings and the adapter that the flags point at."""
  config, directory = _chosen(values)
  model = assembly.tuned_model(config)
  if values.round is not None:
    if not (directory / 'checkpoints').is_dir():
      raise ValueError(f'{directory} has no checkpoints')
    _, state = federation.start(config, model, None)
    checkpointer = checkpoint_lib.Checkpointer(directory / 'checkpoints')
    return config, checkpointer.restore(state, values.round)[0].adapter
  path = directory / 'adapters' / values.stage
  if not path.is_dir():
    found = sorted(p.name for p in (directory / 'adapters').glob('*'))
    raise ValueError(
      f'{directory} has no adapter of stage {values.stage!r}; it has '
      f'{", ".join(found) or "none yet"}'
    )
  return config, load.load_adapter(path, model.config)[0]


def export(values: Flags) -> None:
  """Writes an adapter of a run for PEFT, or merged for transformers."""
  config, adapter = _adapter(values)
  if values.merged:
    # A sum with a kernel in 8 bits would be of less than the model's weights.
    whole = dataclasses.replace(config.model, quantization='')
    config = dataclasses.replace(config, model=whole)
  model = assembly.tuned_model(config)
  if values.merged:
    export_lib.export_merged(
      values.output,
      model.base_params,
      adapter,
      config=model.config,
      source_directory=model.directory,
      scale=config.lora.scale,
    )
  else:
    export_lib.export_adapter(
      values.output,
      adapter,
      config=model.config,
      scale=config.lora.scale,
      base_model_name=str(model.directory),
    )
  print(f'Wrote {values.output}')


def chat(values: Flags) -> None:
  """Answers the requests typed, one a line, with an adapter of a run."""
  config, adapter = _adapter(values)
  sampler = assembly.make_sampler(assembly.tuned_model(config), config)
  sampler = sampler.single()
  print('One request a line; an empty line or Ctrl-D ends.', file=sys.stderr)
  key = jax.random.key(config.seed)
  for number, line in enumerate(sys.stdin):
    if not line.strip():
      break
    (answer,) = sampler.generate(
      adapter,
      [line.strip()],
      key=jax.random.fold_in(key, number),
      temperature=values.temperature,
    )
    print(answer, flush=True)


def serve(values: Flags) -> None:
  """Serves a run's adapters on this machine, with OpenAI's interface."""
  try:
    server = importlib.import_module('fedjax_safety.serve.server')
  except ModuleNotFoundError as error:
    raise ValueError(
      f'serve needs the package {error.name}: pip install '
      f"'fedjax_safety[serve]'"
    ) from error
  config, _ = _chosen(values)
  paths = server.adapters(pathlib.Path(values.workdir), config)
  listening = server.listen(config, paths, port=values.port)
  names = '\n  '.join((server.BASE, *paths))
  print(f'Serving at {listening.url} until Ctrl-C:\n  {names}', flush=True)
  listening.run()


def show_config(values: Flags) -> None:
  """Prints a config as resolved JSON, after overrides, without running it."""
  config_lib.resolve(values.config)
  print(json.dumps(config_lib.to_json(values.config), indent=2))


def plan(values: Flags) -> int:
  """Says what a round costs on devices, and whether it fits, before a run."""
  if values.topology:
    # The devices at hand have no part in it.
    jax.config.update('jax_platforms', 'cpu')
  if values.shape:
    values.config['model']['path'] = values.shape
  # No example is read, so none need be named.
  values.config['data']['normal'] = values.config['data']['normal'] or 'unread'
  experiments = config_lib.resolve(values.config)
  arms = list(dict.fromkeys(arm for arm, _ in experiments))
  _validate.one_of(arms, arm=values.arm or arms[0])
  config = next(
    made
    for (arm, _), made in experiments.items()
    if arm == (values.arm or arms[0])
  )
  made = plan_lib.plan(
    config,
    shape=values.shape,
    topology_name=values.topology,
    search=values.fit,
    memory_gib=values.memory_gib,
  )
  print(
    json.dumps(plan_lib.as_json(made), indent=2)
    if values.json
    else plan_lib.table(made)
  )
  return 0 if made.fits else DOES_NOT_FIT


def show_datasets(values: Flags) -> None:
  """Lists the data sets known by name, their licenses, where to get them."""
  del values
  print(catalog.table())


def calibrate(values: Flags) -> None:
  """Holds judges against answers that people have labeled."""
  config = settings_lib.ExperimentConfig(
    model=settings_lib.ModelConfig(dtype=values.dtype),
    evaluation=evaluation_settings.EvaluationConfig(
      rules=tuple(values.rules or rules.LISTS),
      judge=values.judge or '',
      judge_format=values.judge_format,
      rubric=endpoint_settings.RubricConfig(
        endpoint=endpoint_settings.EndpointConfig(
          key_variable=values.judge_key_variable
        )
      ),
    ),
    performance=settings_lib.PerformanceConfig(
      generation_batch_size=values.batch_size
    ),
  )
  evaluation_checks.check(config.evaluation)
  labeled = {path: labels.load(path) for path in values.labels}
  rows = list(calibration.calibrate(evaluation_inputs.judges(config), labeled))
  show = calibration.to_json if values.json else calibration.table
  print(show(rows))
