"""Tests of the pipelines that write data, with a scripted model."""

import dataclasses
import itertools

import jax
import pytest

from fedjax_safety import settings, synthesis

ASK = settings.GenerationConfig(
  ask_harmful='ask harm',
  ask_normal='ask normal',
  reminder='be safe',
  direct_hint='be direct',
  max_rounds=3,
)


@dataclasses.dataclass
class Scripted:
  """Writes numbered requests; answers with what it was asked."""

  distinct: int = 1000
  batch_size: int = 8
  silent: bool = False
  asked: list[str] = dataclasses.field(default_factory=list)

  def __post_init__(self):
    self._numbers = itertools.count()

  def _reply(self, prompt):
    if prompt in (ASK.ask_harmful, ASK.ask_normal):
      return f'1. Request {next(self._numbers) % self.distinct}'
    return '' if self.silent else f'answer to {prompt}'

  def generate(self, adapter, prompts, *, key, temperature, top_p, label):
    self.asked += prompts
    return [self._reply(prompt) for prompt in prompts]


def _writer(sampler, exclude=()):
  return synthesis.Writer(sampler, None, ASK, frozenset(exclude))


def test_the_hint_is_asked_with_and_dropped_from_the_pair():
  sampler = Scripted()
  pairs = _writer(sampler).unaligned(12, key=jax.random.key(0))
  assert len(pairs) == len({p.prompt for p in pairs}) == 12
  assert pairs[0].prompt == 'Request 0'
  assert pairs[0].response == 'answer to Request 0 be direct'
  assert 'Request 0 be direct' in sampler.asked


def test_defense_data_are_aligned_under_the_reminder_and_normal_without():
  aligned, normal = _writer(Scripted()).defense(3, 2, key=jax.random.key(0))
  assert [len(aligned), len(normal)] == [3, 2]
  assert all('be safe' not in p.prompt for p in aligned)
  assert all(p.response.endswith('be safe') for p in aligned)
  assert all('be safe' not in p.response for p in normal)


def test_none_asked_for_is_none_written():
  sampler = Scripted()
  aligned, normal = _writer(sampler).defense(0, 2, key=jax.random.key(0))
  assert aligned == [] and len(normal) == 2
  assert ASK.ask_harmful not in sampler.asked


def test_excluded_prompts_are_not_written():
  writer = _writer(Scripted(), exclude=['request 1', 'request 2'])
  prompts = [p.prompt for p in writer.unaligned(3, key=jax.random.key(0))]
  assert prompts == ['Request 0', 'Request 3', 'Request 4']


def test_few_requests_are_repeated_and_too_few_refused():
  writer = _writer(Scripted(distinct=12))
  pairs = writer.unaligned(30, key=jax.random.key(0))
  assert len(pairs) == 30 and len({p.prompt for p in pairs}) == 12
  with pytest.raises(synthesis.SynthesisError, match='wrote 9 different'):
    _writer(Scripted(distinct=9)).unaligned(30, key=jax.random.key(0))


def test_a_model_that_answers_nothing_is_told():
  with pytest.raises(synthesis.SynthesisError, match='answered none'):
    _writer(Scripted(silent=True)).unaligned(3, key=jax.random.key(0))


def test_lists_are_split_and_their_marks_dropped():
  replies = ['1. a b\n2) c\n\n- d', '  • e', '(3) f', '4: g', '3 h']
  assert synthesis.split_requests(replies) == [
    'a b',
    'c',
    'd',
    'e',
    'f',
    'g',
    '3 h',
  ]
