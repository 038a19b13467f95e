"""HumanEval's problems: what is asked, and the program that tests an answer.

One greedy answer to each problem: the share that passes is pass@1. (M. Chen et
al., "Evaluating Large Language Models Trained on Code", 2021.)
"""

import dataclasses
import re
from collections.abc import Sequence

from fedjax_safety.data import sources

_COLUMNS = ('test', 'entry_point')
_SOURCE = 'code'
_QUESTION = (
  'Complete this Python function. Answer with the whole function in one block '
  'of code.\n\n```python\n{code}\n```'
)
_FENCE = re.compile(r'```[ \t]*\w*[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)', re.DOTALL)


def is_problem(example: sources.Example) -> bool:
  """Whether an example has the tests of a program."""
  return all(name in example.metadata for name in _COLUMNS)


def questions(problems: Sequence[sources.Example]) -> list[sources.Example]:
  """Returns the problems as requests to an assistant."""
  return [
    dataclasses.replace(
      problem,
      prompt=_QUESTION.format(code=problem.prompt),
      metadata={**problem.metadata, _SOURCE: problem.prompt},
    )
    for problem in problems
  ]


def program(problem: sources.Example, answer: str) -> str:
  """Returns a program that ends without an error if an answer is right.

  The answer is its first block of code, or all of it. It holds the whole
  function, or goes on where the problem's text ends.

  Args:
    problem: of `questions`.
    answer: what a model answered.
  """
  fenced = _FENCE.search(answer)
  written = fenced[1] if fenced else answer
  name = str(problem.metadata['entry_point'])
  start = str(problem.metadata[_SOURCE]).rstrip()
  if not re.search(rf'^[ \t]*def\s+{re.escape(name)}\b', written, re.MULTILINE):
    # The indentation of its first line was stripped with the answer's ends.
    body = written if written[:1].isspace() else f'    {written}'
    return f'{start}\n{body}\n{_tests(problem)}'
  return f'{start}\n    pass\n\n{written}\n{_tests(problem)}'


def _tests(problem: sources.Example) -> str:
  """Returns the lines that test the function."""
  tests, name = problem.metadata['test'], problem.metadata['entry_point']
  return f'\n{tests}\n\ncheck({name})\n'
