"""Asks a model every prompt of every set and has the answers judged."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from fedjax_safety import types
from fedjax_safety.data import sources
from fedjax_safety.evaluation import checks, code, sandbox
from fedjax_safety.evaluation import judges as judges_lib
from fedjax_safety.models import sampler as sampler_lib

Prompts = Sequence[sources.Example]


def exact_match(response: str, reference: str) -> bool:
  """Whether a response is the reference, white space aside."""
  return response.split() == reference.split()


def _refusals(judge, pairs) -> judges_lib.Verdicts | None:
  """Returns a judge's verdicts on refusal, None for judges of safety alone."""
  if judge.kind == 'rule':
    return judge(pairs)
  return judge.refusals(pairs) if hasattr(judge, 'refusals') else None


def _verdicts(
  role: str, pairs, prompts: Prompts, judges, box: sandbox.Sandbox | None
) -> list[dict]:
  """Returns each answer's verdicts, by judge name.

  On harmful prompts True is good (safe or refused); on benign prompts True is
  bad (refused); on tasks there is only the exact match, or whether the answer
  follows the checks or passes the tests. A benign prompt with a reference is
  matched as well. An open prompt has no verdict, but scores.
  """
  columns: dict[str, Sequence[bool | None]] = {}
  if role in ('harmful', 'benign'):
    for judge in judges:
      column = judge(pairs) if role == 'harmful' else _refusals(judge, pairs)
      if column is not None:
        columns[judge.name] = column
  if role in ('benign', 'task') and all(
    example.response for example in prompts
  ):
    columns['exact_match'] = [
      exact_match(response, example.response)
      for (_, response), example in zip(pairs, prompts, strict=True)
    ]
  if role == 'task' and all('checks' in e.metadata for e in prompts):
    columns['follows'] = [
      checks.follows(response, checks.read(str(example.metadata['checks'])))
      for (_, response), example in zip(pairs, prompts, strict=True)
    ]
  if role == 'task' and box and all(map(code.is_problem, prompts)):
    columns['passes'] = box.run(
      [
        code.program(example, response)
        for (_, response), example in zip(pairs, prompts, strict=True)
      ]
    )
  return [
    {name: column[i] for name, column in columns.items()}
    for i in range(len(pairs))
  ]


def evaluate(
  sampler: sampler_lib.Sampler,
  adapter: types.Adapter | None,
  sets: Mapping[str, tuple[str, Prompts]],
  judges: Sequence[Any],
  scorers: Sequence[Any] = (),
  box: sandbox.Sandbox | None = None,
  *,
  key: jax.Array,
  temperature: float,
  top_p: float = 1.0,
  wanted: Callable[[str], bool] = lambda name: True,
) -> Iterator[dict[str, Any]]:
  """Yields one record an answer: set, role, texts, verdicts, scores.

  Prompts are answered at `temperature`, tasks greedily.
  Prompt i of a set draws from the same key whatever model answers, so that
  models are compared on equal draws.

  Args:
    sampler: the model.
    adapter: its adapter, or None for the frozen base.
    sets: name to (role, prompts); a prompt's response is its reference.
    judges: judges from `evaluation.judges`.
    scorers: what gives numbers to the answers of some roles.
    box: where code in answers is run, None not to run any.
    key: a PRNG key.
    temperature: of all answers but those to tasks.
    top_p: nucleus of the same.
    wanted: whether a set, by its name, is asked; the answers to one are the
      same whatever others are.
  """
  for number, (name, (role, prompts)) in enumerate(sets.items()):
    if not wanted(name):
      continue
    asked = [example.prompt for example in prompts]
    answers = sampler.generate(
      adapter,
      asked,
      key=jax.random.fold_in(key, number),
      temperature=0.0 if role == 'task' else temperature,
      top_p=top_p,
      label=f'answering {name}',
    )
    pairs = list(zip(asked, answers, strict=True))
    verdicts = _verdicts(role, pairs, prompts, judges, box)
    scores = {s.name: s(pairs) for s in scorers if role in s.roles}
    for i, (example, answer, verdict) in enumerate(
      zip(prompts, answers, verdicts, strict=True)
    ):
      yield {
        'set': name,
        'role': role,
        'prompt': example.prompt,
        'response': answer,
        'reference': example.response or example.metadata.get('checks'),
        'verdicts': verdict,
        'scores': {name: column[i] for name, column in scores.items()},
      }
