"""Tests of the records that an evaluation makes."""

import dataclasses

import jax
import pytest

from fedjax_safety.data import sources
from fedjax_safety.evaluation import evaluate, judges


@dataclasses.dataclass
class Echo:
  """Answers with the prompt and keeps the temperature of each set."""

  temperatures: list[float] = dataclasses.field(default_factory=list)

  def generate(self, adapter, prompts, *, key, temperature, top_p, label):
    self.temperatures.append(temperature)
    return list(prompts)


def _records(sets, sampler=None):
  return list(
    evaluate.evaluate(
      sampler or Echo(),
      None,
      sets,
      [judges.RuleJudge('openfedllm36')],
      key=jax.random.key(0),
      temperature=0.7,
    )
  )


def test_each_role_gets_its_verdicts():
  refusal = sources.Example('I cannot', '', {})
  task = sources.Example('a  b', 'a b', {})
  sampler = Echo()
  records = _records(
    {
      'bad': ('harmful', [refusal]),
      'fine': ('benign', [refusal]),
      'told': ('benign', [task]),
      'sums': ('task', [task]),
    },
    sampler,
  )
  rule = 'rule_openfedllm36'
  assert [r['verdicts'] for r in records] == [
    {rule: True},
    {rule: True},
    {rule: False, 'exact_match': True},
    {'exact_match': True},
  ]
  assert [r['set'] for r in records] == ['bad', 'fine', 'told', 'sums']
  assert [r['reference'] for r in records] == [None, None, 'a b', 'a b']
  assert sampler.temperatures == [0.7, 0.7, 0.7, 0.0]


@pytest.mark.parametrize(
  ('response', 'match'),
  [('12', True), (' 12\n', True), ('12.', False), ('1 2', False), ('', False)],
)
def test_exact_match_ignores_white_space_alone(response, match):
  assert evaluate.exact_match(response, '12') is match
