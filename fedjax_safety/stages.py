"""What follows the rounds of an arm: measuring, repairing, measuring again.

Each stage leaves a file that a resumed run finds, and is then not run again.
"""

import collections
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm

from fedjax_safety import arm as arm_lib
from fedjax_safety import (
  assembly,
  distributed,
  endpoint,
  federation,
  types,
  workdir,
)
from fedjax_safety import repair as repair_lib
from fedjax_safety import settings as settings_lib
from fedjax_safety.evaluation import evaluate as evaluate_lib
from fedjax_safety.evaluation import inputs as evaluation_inputs
from fedjax_safety.models import export, load
from fedjax_safety.repair import early_stopping
from fedjax_safety.repair import loss as repair_loss
from fedjax_safety.synthesis import written_data

# What the evaluation folds into the run's key.
_EVALUATION = 13
_STAGES = ('federated', *(f'repair_{x}' for x in settings_lib.REPAIR_LEVELS))
# Which judge a reader should believe, the best one first, and why.
_BELIEVE = {
  'truth': (
    'The ground truth checks what an answer gives away. The rule list counts '
    'polite words and the learned judge can be wrong on what it never saw; '
    'real data have only those two.'
  ),
  'learned': (
    'The judge reads the answer to the request. The rule list counts polite '
    'words, which attacked models still use while complying.'
  ),
  'rule': (
    'Only a rule list was run. It counts polite words, not what an answer '
    'gives away: add a judge before you rely on it.'
  ),
}


def saved_adapter(
  arm: arm_lib.Arm, stage: str, make: Callable[[], types.Adapter]
) -> types.Adapter:
  """Returns a stage's adapter, made and saved as PEFT if it is not there.

  It is read back even when it was just made, so that what follows starts from
  the same arrays, in the same layout, in a resumed run.
  """
  model = assembly.tuned_model(arm.config)
  path = arm.directory / 'adapters' / stage
  if not distributed.on_first(path.is_dir):
    start = time.monotonic()
    distributed.on_first(
      export.export_adapter,
      path,
      distributed.fetch(make()),
      config=model.config,
      scale=arm.config.lora.scale,
      base_model_name=str(model.directory),
    )
    arm.timed(stage, time.monotonic() - start)
  return load.load_adapter(path, model.config)[0]


def given_adapter(config: settings_lib.ExperimentConfig) -> types.Adapter:
  """Returns the adapter that a config gives, which none is federated for.

  Raises:
    ValueError: it does not fit the model or the run's scale.
  """
  model, path = assembly.tuned_model(config), config.given_adapter
  if path == settings_lib.NO_ADAPTER:
    return federation.fresh_adapter(config, model, None)
  adapter, scale = load.load_adapter(path, model.config)
  if not math.isclose(scale, config.lora.scale, rel_tol=1e-6):
    raise ValueError(
      f'{path} has the scale alpha/r = {scale:g}, the config '
      f'{config.lora.scale:g}; set --config.lora.rank and --config.lora.alpha '
      f'to those in its adapter_config.json'
    )
  return adapter


def evaluate(
  arm: arm_lib.Arm, stage: str, label: str, adapter: types.Adapter | None
) -> None:
  """Measures an adapter and writes one line an answer, once."""
  config = arm.config.evaluation
  path = workdir.evaluation(arm.directory, stage)
  sets = evaluation_inputs.evaluation_sets(config)
  if not sets or distributed.on_first(path.exists):
    return
  start = time.monotonic()
  judges = evaluation_inputs.judges(arm.config, arm.replies)
  scorers = evaluation_inputs.scorers(arm.config, arm.replies)
  records = evaluate_lib.evaluate(
    assembly.make_sampler(assembly.tuned_model(arm.config), arm.config),
    adapter,
    sets,
    judges,
    scorers,
    evaluation_inputs.code_sandbox(arm.config),
    key=arm.key(_EVALUATION),
    temperature=config.temperature,
    top_p=config.top_p,
  )
  header = {
    'kind': 'header',
    'arm': arm.name,
    'seed': arm.config.seed,
    'stage': stage,
    'label': label,
    'order': 10 * arm.order + _STAGES.index(stage),
    'headline_set': config.headline_set or None,
    **_described(judges),
    'scorers': [{'name': s.name, 'label': s.label} for s in scorers],
  }
  rows = [header]
  for record in records:
    rows.append({'kind': 'record', **record})
    arm.stop.check()
  distributed.on_first(workdir.write_lines, path, rows)
  arm.timed(f'evaluate {stage}', time.monotonic() - start)
  arm.stop.check()


def round_measure(arm: arm_lib.Arm) -> Callable[..., dict[str, float]]:
  """Returns `(round, adapter) -> rates` of the adapters that rounds serve.

  After every `evaluation.every_rounds` rounds: the share of safe answers to
  the headline set by each judge, and of tasks done. An answer without a
  verdict is not safe. The draws are those of the evaluation at the end.
  """
  config = arm.config.evaluation
  sets = evaluation_inputs.evaluation_sets(config)
  if not config.every_rounds or not sets:
    return lambda round_index, adapter: {}
  judges = evaluation_inputs.judges(arm.config)
  sampler = assembly.make_sampler(assembly.tuned_model(arm.config), arm.config)
  headline = (config.headline_set,) if config.headline_set else sets

  def wanted(name):
    role = sets[name][0]
    return role == 'task' or (role == 'harmful' and name in headline)

  def measure(round_index, adapter):
    if (round_index + 1) % config.every_rounds:
      return {}
    records = evaluate_lib.evaluate(
      sampler,
      distributed.fetch(adapter),
      sets,
      judges,
      key=arm.key(_EVALUATION),
      temperature=config.temperature,
      top_p=config.top_p,
      wanted=wanted,
    )
    return _rates(records)

  return measure


def _rates(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
  """Returns the share of good verdicts by what they say of which judge."""
  good = collections.defaultdict(list)
  for record in records:
    about = 'helpfulness' if record['role'] == 'task' else 'safety'
    for name, verdict in record['verdicts'].items():
      good[f'{about}/{name}'].append(verdict is True)
  return {name: statistics.fmean(each) for name, each in good.items()}


def _described(judges: Sequence[Any]) -> dict[str, Any]:
  """Returns what a report needs to know of the judges."""
  kinds = {judge.kind: judge.name for judge in reversed(judges)}
  believe, reason = next(
    (kinds[kind], words) for kind, words in _BELIEVE.items() if kind in kinds
  )
  return {
    'judges': [
      {'name': j.name, 'label': j.label, 'kind': j.kind} for j in judges
    ],
    'headline_judges': [
      kinds[kind] for kind in ('rule', 'learned', 'truth') if kind in kinds
    ],
    'believe': believe,
    'believe_reason': reason,
  }


def endpoints_to_judge(
  config: settings_lib.ExperimentConfig, directory: pathlib.Path
) -> list[endpoint.Endpoint]:
  """Returns the endpoints that have yet to judge an arm's answers.

  Args:
    config: the arm's settings.
    directory: where the arm's files are.
  """
  stages = ('federated', *(f'repair_{x}' for x in config.defense.repair.levels))
  if all(workdir.evaluation(directory, stage).exists() for stage in stages):
    return []
  rubric = config.evaluation.rubric
  named = {
    'evaluation.judge': config.evaluation.judge,
    'evaluation.rubric.judge': rubric.judge,
  }
  return [
    endpoint.Endpoint(name, setting, rubric.endpoint)
    for setting, name in named.items()
    if endpoint.is_endpoint(name)
  ]


def repair(
  arm: arm_lib.Arm, level: str, adapter: types.Adapter
) -> types.Adapter:
  """Tunes the aggregated adapter on a level's defense data."""
  settings = arm.config.defense.repair
  pairs, held = early_stopping.split(
    written_data.defense_data(arm, level, adapter),
    settings.early_stopping.held_out_share,
    seed=arm.config.seed,
  )
  arm.stop.check()
  model = assembly.tuned_model(arm.config)
  steps = repair_lib.repair(
    model.base_params,
    adapter,
    assembly.encode(pairs, model, arm.config),
    np.array([pair.metadata['kind'] == 'normal' for pair in pairs]),
    settings,
    loss_fn=repair_loss.of(arm.config),
    seed=arm.config.seed,
  )
  if held:
    measure = early_stopping.held_out_loss(held, model, arm.config)
    steps = early_stopping.best(steps, measure, settings)
  repaired = adapter
  about = {'kind': 'repair', 'arm': arm.name, 'seed': arm.config.seed}
  with tqdm.tqdm(
    total=settings.num_steps,
    desc=f'{arm.name}: repair, {level}',
    disable=not distributed.is_first(),
  ) as bar:
    for done, tuned, values in steps:
      repaired = tuned
      arm.writer.write(
        {**about, 'stage': f'repair_{level}', 'step': done, **values}
      )
      bar.set_postfix(loss=f'{values["repair/loss"]:.3f}', refresh=False)
      bar.update(done - bar.n)
      arm.stop.check()
  return repaired
