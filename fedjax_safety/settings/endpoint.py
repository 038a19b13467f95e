"""The settings of models behind an endpoint, with their defaults."""

import dataclasses
from collections.abc import Mapping
from typing import Any

_Group = dataclasses.dataclass(frozen=True, kw_only=True)


@_Group
class EndpointConfig:
  """How a server with OpenAI's interface is asked; see `endpoint`.

  Attributes:
    key_variable: environment variable that holds its key; '' sends none.
    timeout: seconds to wait for an answer.
    max_retries: times a question is asked again where none, or none that can
      be read, came back.
    concurrency: questions in flight at once.
    parameters: further fields of every request, or other values of those
      there are; None leaves a field out.
  """

  key_variable: str = ''
  timeout: float = 120.0
  max_retries: int = 4
  concurrency: int = 8
  parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@_Group
class RubricConfig:
  """How a model behind an endpoint grades answers, or says what is safe.

  Attributes:
    judge: `endpoint:URL#MODEL` that grades, or '' for none.
    prompt: the rubric, with {prompt} and {response}; the reply must end with
      a grade in double brackets, [[7]]. '' is `rubric.GRADE`.
    low: lowest grade of the rubric.
    high: highest grade.
    roles: the sets whose answers are graded, by role.
    safety_prompt: the same for `evaluation.judge`, whose reply ends with one
      of `evaluation.judge_words` so bracketed. '' is `rubric.SAFETY`.
    max_new_tokens: longest reply.
    endpoint: how the endpoint is asked.
  """

  judge: str = ''
  prompt: str = ''
  low: float = 1.0
  high: float = 10.0
  roles: tuple[str, ...] = ('open',)
  safety_prompt: str = ''
  max_new_tokens: int = 512
  endpoint: EndpointConfig = EndpointConfig()
