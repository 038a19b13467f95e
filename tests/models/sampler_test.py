"""Generation: equal to the forward it caches, and to each row alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_safety.models import config as config_lib
from fedjax_safety.models import decoder, sampler

NUM_NEW = 5


@pytest.fixture
def model(hf_config, random_params):
  config = config_lib.from_hf(hf_config(max_position_embeddings=64))
  return decoder.Decoder(config), random_params(config)


def _generate(model, tokens, lengths, *, keys=None, **kwargs):
  net, params = model
  if keys is None:
    keys = jax.random.split(jax.random.key(0), len(tokens))
  settings = {'temperature': 1.0, 'top_p': 1.0, 'greedy': True} | kwargs
  return np.asarray(
    sampler.generate_tokens(
      net,
      params,
      {},
      jnp.asarray(tokens),
      jnp.asarray(lengths),
      keys,
      settings['temperature'],
      settings['top_p'],
      max_new_tokens=NUM_NEW,
      eos_ids=kwargs.get('eos_ids', (-5,)),
      greedy=settings['greedy'],
    )
  )


def _prompts():
  rng = np.random.default_rng(3)
  lengths = np.array([4, 7, 1])
  tokens = rng.integers(1, 48, (3, 7)).astype(np.int32)
  return tokens, lengths


def test_greedy_equals_the_forward_without_a_cache(model):
  net, params = model
  tokens, lengths = _prompts()
  output = _generate(model, tokens, lengths)
  for row, length, generated in zip(tokens, lengths, output, strict=True):
    text = list(row[:length])
    for token in generated:
      logits = net.apply({'params': params}, jnp.asarray([text]))
      assert token == int(jnp.argmax(logits[0, -1]))
      text.append(int(token))


@pytest.mark.parametrize('greedy', [True, False])
def test_a_row_depends_on_itself_and_its_key_alone(model, greedy):
  tokens, lengths = _prompts()
  keys = jax.random.split(jax.random.key(1), 3)
  together = _generate(model, tokens, lengths, keys=keys, greedy=greedy)
  order = np.array([2, 0, 1])
  changed = tokens.copy()
  for row, length in zip(changed, lengths, strict=True):
    row[length:] = 9
  moved = _generate(
    model, changed[order], lengths[order], keys=keys[order], greedy=greedy
  )
  np.testing.assert_array_equal(moved, together[order])


def test_draws_follow_the_key(model):
  tokens, lengths = _prompts()
  draws = [
    _generate(
      model,
      tokens,
      lengths,
      keys=jax.random.split(jax.random.key(seed), 3),
      greedy=False,
      temperature=3.0,
    )
    for seed in (1, 1, 2)
  ]
  np.testing.assert_array_equal(draws[0], draws[1])
  assert (draws[0] != draws[2]).any()


def test_a_tiny_nucleus_is_greedy(model):
  tokens, lengths = _prompts()
  narrow = _generate(model, tokens, lengths, greedy=False, top_p=1e-6)
  np.testing.assert_array_equal(narrow, _generate(model, tokens, lengths))


def test_a_row_ends_at_its_end_token(model):
  tokens, lengths = _prompts()
  free = _generate(model, tokens, lengths)
  end = int(free[0, 2])
  ended = _generate(model, tokens, lengths, eos_ids=(end,))
  for row, plain in zip(ended, free, strict=True):
    stops = np.flatnonzero(plain == end)
    first = stops[0] if stops.size else NUM_NEW
    np.testing.assert_array_equal(row[:first], plain[:first])
    assert (row[first:] == -1).all()


def test_lengths_in_one_bucket_share_a_program(model):
  net, params = model

  class Words:
    def decode(self, ids, skip_special_tokens):
      del skip_special_tokens
      return ' '.join(map(str, ids))

  text = sampler.Sampler(
    model=net,
    base_params=params,
    tokenizer=Words(),
    encode_prompts=lambda prompts: [[1] * len(p.split()) for p in prompts],
    stop_ids=(2,),
    max_new_tokens=3,
    batch_size=2,
    length_bucket=8,
    progress=False,
  )
  key = jax.random.key(0)
  text.generate(None, ['a b c'], key=key)
  before = sampler.generate_tokens._cache_size()
  answers = text.generate(None, ['a', 'a b c d e f g', 'a b'], key=key)
  assert sampler.generate_tokens._cache_size() == before
  assert len(answers) == 3 and all(answers)
  text.generate(None, ['a ' * 9], key=key)
  assert sampler.generate_tokens._cache_size() == before + 1


@pytest.mark.parametrize('wrong', [{'temperature': -1.0}, {'top_p': 0.0}])
def test_out_of_range_draws_are_refused(model, wrong):
  net, params = model
  text = sampler.Sampler(net, params, None, lambda prompts: [[1]], (2,))
  with pytest.raises(ValueError, match=next(iter(wrong))):
    text.generate(None, ['a'], key=jax.random.key(0), **wrong)
