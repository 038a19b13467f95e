"""Tests of text in, text out; of its tokens, see `batcher_test.py`."""

import jax
import numpy as np
import pytest

from fedjax_safety.models import config as config_lib
from fedjax_safety.models import decoder, sampler, stepper


class Words:
  """A tokenizer that shows ids."""

  def decode(self, ids, skip_special_tokens):
    del skip_special_tokens
    return ' '.join(map(str, ids))


@pytest.fixture
def text(hf_config, random_params):
  """A sampler whose prompts are as long as their words are many."""
  config = config_lib.from_hf(hf_config(max_position_embeddings=64))
  return sampler.Sampler(
    model=decoder.Decoder(config),
    base_params=random_params(config),
    tokenizer=Words(),
    encode_prompts=lambda prompts: [
      [len(word) for word in p.split()] for p in prompts
    ],
    stop_ids=(2,),
    max_new_tokens=3,
    batch_size=2,
    length_bucket=8,
    progress=False,
  )


PROMPTS = ('a', 'a bb ccc a bb ccc a', 'bb a', 'ccc bb a', 'a a')


def test_lengths_in_one_bucket_share_programs(text):
  key = jax.random.key(0)
  text.generate(None, ['a b c'], key=key)
  programs = (stepper.read, stepper.extend)
  before = [program._cache_size() for program in programs]
  answers = text.generate(None, PROMPTS[:3], key=key)
  assert [program._cache_size() for program in programs] == before
  assert len(answers) == 3 and all(answers)
  text.generate(None, ['a ' * 9], key=key)
  assert [p._cache_size() for p in programs] == [n + 1 for n in before]


def test_a_prompt_draws_from_its_own_place(text):
  """Wherever it is put, as when the loop took one batch after another."""
  key = jax.random.key(0)
  answers = text.generate(None, PROMPTS, key=key, temperature=2.0)
  again = text.generate(None, PROMPTS, key=key, temperature=2.0, top_p=1.0)
  other = text.generate(None, PROMPTS, key=jax.random.key(1), temperature=2.0)
  assert answers == again != other
  for index, prompt in enumerate(PROMPTS):
    asked = [*['a'] * index, prompt]
    assert (
      text.generate(None, asked, key=key, temperature=2.0)[-1]
      == (answers[index])
    )
  logits = text.next_token_logits(None, PROMPTS)
  first = np.array([int(answer.split()[0]) for answer in answers])
  draws = [
    jax.random.categorical(
      jax.random.fold_in(jax.random.fold_in(key, i), 0), row / 2
    )
    for i, row in enumerate(logits)
  ]
  np.testing.assert_array_equal(first, draws)


def test_no_prompts_have_no_answers(text):
  assert text.generate(None, [], key=jax.random.key(0)) == []


def test_prompts_without_tokens_are_refused(text):
  with pytest.raises(ValueError, match="no tokens: ' '"):
    text.generate(None, ['a', ' '], key=jax.random.key(0))


@pytest.mark.parametrize('wrong', [{'temperature': -1.0}, {'top_p': 0.0}])
def test_out_of_range_draws_are_refused(text, wrong):
  with pytest.raises(ValueError, match=next(iter(wrong))):
    text.generate(None, ['a'], key=jax.random.key(0), **wrong)
