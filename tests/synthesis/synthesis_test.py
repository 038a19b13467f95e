"""Tests of the pipelines that write data, with a scripted model."""

import collections
import dataclasses
import itertools
import re

import jax
import pytest

from fedjax_safety import config, settings, synthesis
from fedjax_safety.settings import repair as repair_settings
from fedjax_safety.synthesis import filters as written_filters

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
  pairs = _writer(sampler).unaligned(12, key=jax.random.key(0)).pairs
  assert len(pairs) == len({p.prompt for p in pairs}) == 12
  assert pairs[0].prompt == 'Request 0'
  assert pairs[0].response == 'answer to Request 0 be direct'
  assert 'Request 0 be direct' in sampler.asked


def test_defense_data_are_aligned_under_the_reminder_and_normal_without():
  found = _writer(Scripted()).defense(3, 2, key=jax.random.key(0))
  aligned, normal = (written.pairs for written in found)
  assert [len(aligned), len(normal)] == [3, 2]
  assert all('be safe' not in p.prompt for p in aligned)
  assert all(p.response.endswith('be safe') for p in aligned)
  assert all('be safe' not in p.response for p in normal)


def test_none_asked_for_is_none_written():
  sampler = Scripted()
  aligned, normal = _writer(sampler).defense(0, 2, key=jax.random.key(0))
  assert aligned.pairs == [] and len(normal.pairs) == 2
  assert ASK.ask_harmful not in sampler.asked


def test_excluded_prompts_are_not_written():
  writer = _writer(Scripted(), exclude=['request 1', 'request 2'])
  written = writer.unaligned(3, key=jax.random.key(0))
  prompts = [p.prompt for p in written.pairs]
  assert prompts == ['Request 0', 'Request 3', 'Request 4']
  assert written.account == {
    'requests': 5,
    'kept': 3,
    'dropped': {'evaluation': 2, 'distinct': 0, 'answered': 0},
    'would_drop': {'refusal': 0},
  }


def test_few_requests_are_repeated_and_too_few_refused():
  writer = _writer(Scripted(distinct=12))
  pairs = writer.unaligned(30, key=jax.random.key(0)).pairs
  assert len(pairs) == 30 and len({p.prompt for p in pairs}) == 12
  with pytest.raises(synthesis.SynthesisError, match='wrote 9 usable'):
    _writer(Scripted(distinct=9)).unaligned(30, key=jax.random.key(0))


def test_a_model_that_answers_nothing_is_told():
  with pytest.raises(synthesis.SynthesisError, match='dropped: answered 3'):
    _writer(Scripted(silent=True)).unaligned(3, key=jax.random.key(0))


def test_without_a_filter_all_is_kept_and_what_each_would_drop_is_counted():
  sampler = Scripted(distinct=4)
  asked = dataclasses.replace(ASK, filter=('none',))
  writer = synthesis.Writer(sampler, None, asked, frozenset(['request 2']))
  written = writer.unaligned(12, key=jax.random.key(0))
  prompts = [p.prompt for p in written.pairs]
  assert prompts == [f'Request {i}' for i in range(4)] * 3
  assert written.account == {
    'requests': 12,
    'kept': 12,
    'dropped': {},
    'would_drop': {'evaluation': 3, 'distinct': 8, 'answered': 0, 'refusal': 0},
  }


def test_answers_that_do_not_suit_their_kind_are_dropped():
  strict = dataclasses.replace(
    ASK, filter=('distinct', 'refusal'), reminder='I am sorry', direct_hint=''
  )
  writer = synthesis.Writer(Scripted(), None, strict)
  for written in writer.defense(4, 4, key=jax.random.key(0)):
    assert written.account['dropped'] == {'distinct': 0, 'refusal': 0}
  plain = dataclasses.replace(strict, reminder='')
  writer = synthesis.Writer(Scripted(), None, plain)
  with pytest.raises(synthesis.SynthesisError, match='dropped: refusal 4'):
    writer.defense(4, 0, key=jax.random.key(0))


@dataclasses.dataclass
class Wavering(Scripted):
  """Refuses request n under the reminder, not on every n-th try from the 2nd.

  From 8 on it refuses 9 alone.
  """

  def generate(self, adapter, prompts, *, key, temperature, top_p, label):
    answers = super().generate(
      adapter, prompts, key=key, temperature=temperature, top_p=top_p, label=''
    )
    if label.endswith('requests'):
      return answers
    tries = collections.Counter()
    for i, prompt in enumerate(prompts):
      number = int(re.search(r'\d+', prompt)[0])
      tries[prompt] += 1
      complies = number and tries[prompt] % number == 0 and tries[prompt] > 1
      complies |= number >= 8 and number != 9 or 'be safe' not in prompt
      answers[i] = 'here you are' if complies else 'I am sorry'
    return answers


def test_what_the_model_does_not_keep_refusing_is_dropped():
  sampler = Wavering()
  asked = dataclasses.replace(
    ASK,
    filter=('answered', 'agreement'),
    agreement=repair_settings.AgreementConfig(samples=4, share=0.6),
  )
  writer = synthesis.Writer(sampler, None, asked)
  aligned, normal = writer.defense(6, 3, key=jax.random.key(0))
  # Request 1 is refused in one of four tries, 2 in two, 3 in three.
  prompts = [pair.prompt for pair in aligned.pairs]
  assert prompts == [f'Request {i}' for i in (0, 3, 4, 5, 0, 3)]
  assert aligned.account['kept'] == 4
  assert aligned.account['dropped'] == {'answered': 0, 'agreement': 2}
  assert 'agreement' not in aligned.account['would_drop']
  assert sampler.asked.count('Request 5 be safe') == 5
  # What is refused under the reminder is not normal, whatever was answered.
  assert normal.account['dropped'] == {'answered': 0, 'agreement': 1}
  prompts = [pair.prompt for pair in normal.pairs]
  assert prompts == [f'Request {i}' for i in (8, 10, 8)]
  assert all(pair.response == 'here you are' for pair in normal.pairs)
  # Attack data are not asked about again.
  sampler.asked.clear()
  writer.unaligned(3, key=jax.random.key(0))
  assert len(sampler.asked) == 8 + 3


def test_agreement_is_off_by_default_and_needs_answers_that_differ():
  sampler = Wavering()
  _writer(sampler).defense(6, 3, key=jax.random.key(0))
  assert sampler.asked.count('Request 5 be safe') == 1
  tree = config.to_json(config.default())
  chosen = tree['defense']['repair']['generation']
  chosen |= {'filter': ['agreement'], 'answer_temperature': 0.0}
  with pytest.raises(ValueError, match='answer_temperature=0 makes all alike'):
    config.resolve(tree)
  chosen |= {'answer_temperature': 0.7, 'agreement': {'samples': 0}}
  with pytest.raises(ValueError, match=r'agreement\.samples=0'):
    config.resolve(tree)


@pytest.mark.parametrize('names', [(), ('none', 'distinct'), ('distinkt',)])
def test_filters_are_known_or_none(names):
  with pytest.raises(ValueError, match='here'):
    written_filters.check(names, 'here')


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
