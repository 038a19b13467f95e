"""Builds what an evaluation needs: prompts, judges, scorers."""

import dataclasses
import functools
import pathlib
from typing import Any

from fedjax_safety import assembly, endpoint
from fedjax_safety import settings as settings_lib
from fedjax_safety.data import poison, sources
from fedjax_safety.demo_world import named
from fedjax_safety.endpoint import replies
from fedjax_safety.evaluation import (
  checks,
  code,
  judge_formats,
  reward,
  sandbox,
)
from fedjax_safety.evaluation import judges as judges_lib
from fedjax_safety.evaluation import rubric as rubric_lib
from fedjax_safety.settings import evaluation as evaluation_settings

Examples = list[sources.Example]


def _prompts(
  chosen: evaluation_settings.EvaluationSetConfig, *, run_code: bool
) -> Examples:
  """Returns the prompts of a file; tasks have a reference, checks or tests."""
  fields = tuple(sorted(chosen.fields.items()))
  if chosen.role != 'task':
    return list(assembly.read(chosen.source, fields, False))
  (first,) = sources.load_examples(
    chosen.source,
    fields=dict(fields) or None,
    need_response=False,
    skip_empty=True,
    limit=1,
  )
  if code.is_problem(first):
    if not run_code:
      raise ValueError(
        f'{chosen.source} has tests, which run what the model writes: allow '
        f'that with evaluation.allow_code_execution=true, or leave it out'
      )
    return code.questions(assembly.read(chosen.source, fields, False))
  if 'checks' not in first.metadata:
    return list(assembly.read(chosen.source, fields, True))
  return checks.usable(assembly.read(chosen.source, fields, False))


def evaluation_sets(
  config: evaluation_settings.EvaluationConfig,
) -> dict[str, tuple[str, Examples]]:
  """Returns every set's role and prompts.

  Raises:
    ValueError: a set cannot be read or is empty.
  """
  sets = {}
  for name, chosen in config.sets.items():
    if not chosen.source:
      continue
    if named.is_named(chosen.source):
      prompts = named.prompts(chosen.source, limit=chosen.limit)
    else:
      prompts = _prompts(chosen, run_code=config.allow_code_execution)
      if chosen.where:
        prompts = sources.select(prompts, chosen.where)
      if chosen.role == 'harmful':
        prompts = [dataclasses.replace(p, response='') for p in prompts]
      prompts = prompts[: chosen.limit or None]
    if chosen.trigger:
      prompts = [
        dataclasses.replace(
          p, prompt=poison.with_trigger(p.prompt, chosen.trigger)
        )
        for p in prompts
      ]
    sets[name] = (chosen.role, prompts)
  return sets


def code_sandbox(
  config: settings_lib.ExperimentConfig,
) -> sandbox.Sandbox | None:
  """Returns where a model's code is run, None if it must not be.

  Raises:
    ValueError: it should be, but cannot safely be on this machine.
  """
  if not config.evaluation.allow_code_execution:
    return None
  made = sandbox.Sandbox(with_network=config.evaluation.allow_code_network)
  made.check()
  return made


def _asked(
  config: settings_lib.ExperimentConfig,
  setting: str,
  name: str,
  directory: pathlib.Path | None,
) -> replies.EndpointSampler:
  """Returns the endpoint that judges, which has not been asked anything."""
  rubric = config.evaluation.rubric
  return replies.EndpointSampler(
    endpoint.Endpoint(name, setting, rubric.endpoint),
    directory,
    rubric.max_new_tokens,
  )


def scorers(
  config: settings_lib.ExperimentConfig, directory: pathlib.Path | None = None
) -> list[Any]:
  """Returns what gives an answer a number: a reward model, a rubric.

  Args:
    config: the settings.
    directory: where the replies of endpoints are kept, None for nowhere.

  Raises:
    ValueError: one of them cannot be loaded.
  """
  rubric, chosen = config.evaluation.rubric, []
  if config.evaluation.reward_model:
    chosen.append(reward.load(config.evaluation.reward_model))
  if rubric.judge:
    chosen.append(
      rubric_lib.RubricScorer(
        _asked(config, 'evaluation.rubric.judge', rubric.judge, directory),
        rubric.prompt or rubric_lib.GRADE,
        rubric.low,
        rubric.high,
        rubric.roles,
      )
    )
  return chosen


def learned_judge(
  config: settings_lib.ExperimentConfig, directory: pathlib.Path | None = None
) -> (
  judges_lib.LearnedJudge | judges_lib.FormatJudge | rubric_lib.EndpointJudge
):
  """Loads the judge that the settings name, with its way of being asked.

  Args:
    config: the settings.
    directory: where the replies of endpoints are kept, None for nowhere.

  Raises:
    ValueError: the judge cannot be read, or does not fit its format.
  """
  evaluation = config.evaluation
  if endpoint.is_endpoint(evaluation.judge):
    return rubric_lib.EndpointJudge(
      _asked(config, 'evaluation.judge', evaluation.judge, directory),
      evaluation.rubric.safety_prompt or rubric_lib.SAFETY,
      evaluation.judge_words,
    )
  name = evaluation.judge_format
  if name == judge_formats.QUESTION:
    model = assembly.load_model(
      evaluation.judge, config.model.dtype, evaluation.judge_template
    )
    return judges_lib.LearnedJudge(
      assembly.make_sampler(model, config, lora_scale=1.0),
      evaluation.judge_prompt,
      evaluation.judge_words,
    )
  chosen = judge_formats.FORMATS[name]
  if not pathlib.Path(evaluation.judge).is_dir():
    raise ValueError(
      chosen.how_to_get(
        f'evaluation.judge={evaluation.judge!r} is no directory'
      )
    )
  # The question is the format's; the template of the loader is not used.
  model = assembly.load_model(evaluation.judge, config.model.dtype, 'alpaca')
  chosen.question(model.tokenizer, '', '')
  sampler = dataclasses.replace(
    assembly.make_sampler(model, config, lora_scale=1.0),
    encode_prompts=functools.partial(chosen.encode, model.tokenizer),
    max_new_tokens=chosen.max_new_tokens,
  )
  return judges_lib.FormatJudge(sampler, name)


def judges(
  config: settings_lib.ExperimentConfig, directory: pathlib.Path | None = None
) -> list[Any]:
  """Returns the judges: rule lists, the learned one, the world's truth.

  Args:
    config: the settings.
    directory: where the replies of endpoints are kept, None for nowhere.
  """
  evaluation = config.evaluation
  chosen: list[Any] = [judges_lib.RuleJudge(rule) for rule in evaluation.rules]
  if evaluation.judge:
    chosen.append(learned_judge(config, directory))
  worlds = {
    named.world(s.source)
    for s in evaluation.sets.values()
    if named.is_named(s.source)
  }
  if len(worlds) == 1:
    chosen.append(judges_lib.TruthJudge(worlds.pop()))
  return chosen
