"""Checks of the settings of an evaluation against their ranges."""

from fedjax_safety import _validate, endpoint
from fedjax_safety.data import templates
from fedjax_safety.evaluation import judge_formats, rules
from fedjax_safety.settings import evaluation as evaluation_settings


def check(evaluation: evaluation_settings.EvaluationConfig) -> None:
  """Raises unless the sets and judges can be used."""
  for name, prompts in evaluation.sets.items():
    path = f'evaluation.sets.{name}'
    _validate.one_of(
      evaluation_settings.ROLES, **{f'{path}.role': prompts.role}
    )
    _validate.non_negative(**{f'{path}.limit': prompts.limit})
  if evaluation.headline_set:
    _validate.one_of(
      evaluation.sets, **{'evaluation.headline_set': evaluation.headline_set}
    )
  check_drawing('evaluation', evaluation.temperature, evaluation.top_p)
  _validate.positive(**{'evaluation.max_new_tokens': evaluation.max_new_tokens})
  _validate.non_negative(**{'evaluation.every_rounds': evaluation.every_rounds})
  for rule in evaluation.rules:
    _validate.one_of(rules.LISTS, **{'evaluation.rules': rule})
  if not evaluation.rules and not evaluation.judge:
    raise ValueError(
      'evaluation.rules and evaluation.judge are both empty, so nothing would '
      'judge an answer; name a rule list or a judge'
    )
  _validate.one_of(
    judge_formats.NAMES, **{'evaluation.judge_format': evaluation.judge_format}
  )
  _check_rubric(evaluation)
  if endpoint.is_endpoint(evaluation.judge):
    _check_words(evaluation)
  elif evaluation.judge and evaluation.judge_format == judge_formats.QUESTION:
    _check_question(evaluation)


def _check_rubric(evaluation: evaluation_settings.EvaluationConfig) -> None:
  """Raises unless an endpoint can grade and judge as it is set to."""
  rubric, path = evaluation.rubric, 'evaluation.rubric'
  for setting, name in (
    ('evaluation.judge', evaluation.judge),
    (f'{path}.judge', rubric.judge),
  ):
    endpoint.check_settings(name, setting, rubric.endpoint, f'{path}.endpoint')
  if rubric.judge and not endpoint.is_endpoint(rubric.judge):
    raise ValueError(
      f'{path}.judge={rubric.judge!r} must be an endpoint:URL#MODEL'
    )
  if not rubric.low < rubric.high:
    raise ValueError(
      f'{path}.low={rubric.low:g} must be below high={rubric.high:g}'
    )
  _validate.positive(**{f'{path}.max_new_tokens': rubric.max_new_tokens})
  for role in rubric.roles:
    _validate.one_of(evaluation_settings.ROLES, **{f'{path}.roles': role})
  for key in ('prompt', 'safety_prompt'):
    if text := getattr(rubric, key):
      _check_parts(f'{path}.{key}', text)
  graded = rubric.judge and 'open' in rubric.roles
  unread = [n for n, s in evaluation.sets.items() if s.role == 'open']
  if unread and not (graded or evaluation.reward_model):
    raise ValueError(
      f'nothing would read the answers to evaluation.sets.{unread[0]}, whose '
      f'role is open; set {path}.judge, or give it another role'
    )


def _check_words(evaluation: evaluation_settings.EvaluationConfig) -> None:
  """Raises unless a judge has two answers."""
  if len({word.lower() for word in evaluation.judge_words}) != 2:
    raise ValueError(
      f'evaluation.judge_words={evaluation.judge_words} must be two words, '
      f'the safe one first'
    )


def _check_question(evaluation: evaluation_settings.EvaluationConfig) -> None:
  """Raises unless a judge can be asked in the config's own words."""
  _check_words(evaluation)
  template = evaluation.judge_template
  _validate.one_of(templates.NAMES, **{'evaluation.judge_template': template})
  _check_parts('evaluation.judge_prompt', evaluation.judge_prompt)


def _check_parts(setting: str, text: str) -> None:
  """Raises unless a question has a place for both texts."""
  for part in ('{prompt}', '{response}'):
    if part not in text:
      raise ValueError(f'{setting}={text!r} lacks {part}')


def check_drawing(path: str, temperature: float, top_p: float) -> None:
  """Raises unless tokens can be drawn with these settings."""
  _validate.non_negative(**{f'{path}.temperature': temperature})
  _validate.positive(**{f'{path}.top_p': top_p})
  _validate.in_range(0, 1, **{f'{path}.top_p': top_p})
