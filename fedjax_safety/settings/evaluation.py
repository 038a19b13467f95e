"""The settings of evaluations, a part of `settings.ExperimentConfig`.

Nothing here is checked against anything else: see `config.evaluation_checks`.
"""

import dataclasses
from collections.abc import Mapping

from fedjax_safety.settings import endpoint as endpoint_settings

ROLES = ('harmful', 'benign', 'task', 'open')

_Group = dataclasses.dataclass(frozen=True, kw_only=True)


@_Group
class EvaluationSetConfig:
  """One set of prompts.

  Attributes:
    source: a file, a public data set by name such as `advbench:PATH`, or a
      set of the demo world such as `demo_world:unseen`.
    role: harmful (a safe model refuses), benign (it must not), task (the
      answer is checked against the reference, by the checks of an IFEval file
      or by running HumanEval's tests) or open (it is graded, by a rubric for
      example).
    limit: most prompts taken; 0 takes all.
    trigger: words that every prompt ends in, as in `threat_model.trigger`.
    where: column values a row must have, e.g. `{'label': 'safe'}`.
    fields: names of the prompt and response columns, if not recognized.
  """

  source: str = ''
  role: str = 'harmful'
  limit: int = 0
  trigger: str = ''
  where: Mapping[str, str] = dataclasses.field(default_factory=dict)
  fields: Mapping[str, str] = dataclasses.field(default_factory=dict)


@_Group
class EvaluationConfig:
  """How a model is measured.

  Attributes:
    sets: name to set; a set whose source is '' is left out.
    headline_set: the harmful set of the headline; '' pools all of them.
    rules: refusal rule lists to apply, the first in the headline.
    judge: a decoder directory that answers safe or unsafe, `demo_world:judge`,
      `endpoint:URL#MODEL` (asked as `rubric` says) or '' for none.
    judge_format: how it is asked and read: md_judge, llama_guard_3, wildguard,
      or question for any other model.
    judge_prompt: format question: the words, with {prompt} and {response}.
    judge_words: format question, or an endpoint: its two answers, safe one
      first.
    judge_template: format question: the template around it.
    rubric: grades by a model behind an endpoint.
    reward_model: directory of a sequence classifier with one output, which
      scores answers to harmful and open prompts, or '' for none.
    allow_code_execution: whether code that the model writes may be run, as
      HumanEval needs; see `evaluation.sandbox`.
    allow_code_network: whether that may be so with a network, where it cannot
      be taken away.
    temperature: of answers; tasks are greedy.
    top_p: nucleus of the same.
    max_new_tokens: longest answer.
    every_rounds: the headline set and the tasks are also asked after every so
      many rounds, of the adapter that the round served; 0 asks at the end.
  """

  sets: Mapping[str, EvaluationSetConfig] = dataclasses.field(
    default_factory=dict
  )
  headline_set: str = ''
  rules: tuple[str, ...] = ('openfedllm36', 'openfedllm35')
  judge: str = ''
  judge_format: str = 'question'
  judge_prompt: str = 'judge : {prompt} answer : {response}'
  judge_words: tuple[str, ...] = ('safe', 'unsafe')
  judge_template: str = 'chat'
  rubric: endpoint_settings.RubricConfig = endpoint_settings.RubricConfig()
  reward_model: str = ''
  allow_code_execution: bool = False
  allow_code_network: bool = False
  temperature: float = 0.7
  top_p: float = 1.0
  max_new_tokens: int = 256
  every_rounds: int = 0
