"""Tests of generation: rows that come and go, each as if it were alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_safety import lora
from fedjax_safety.models import batcher, decoder, stepper
from fedjax_safety.models import config as config_lib

NUM_NEW, BUCKET = 5, 8
LENGTHS = (4, 7, 1, 8, 3, 2, 6)
LIMITS = (5, 2, 5, 1, 4, 3, 5)


@pytest.fixture
def model(hf_config, random_params):
  config = config_lib.from_hf(hf_config(max_position_embeddings=64))
  return decoder.Decoder(config, lora_scale=0.5), random_params(config)


def _requests(**settings):
  """Returns requests of several lengths and limits, each with its key."""
  rng = np.random.default_rng(3)
  keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(1), 7)))
  return [
    batcher.Request(
      rng.integers(1, 48, length).tolist(),
      key,
      limit,
      **{name: values[i] for name, values in settings.items()},
    )
    for i, (length, limit, key) in enumerate(
      zip(LENGTHS, LIMITS, keys, strict=True)
    )
  ]


def _run(model, requests, *, rows=3, adapter=None, stop_ids=()):
  """Returns the tokens of every request."""
  found = batcher.run(
    *model,
    adapter or {},
    requests,
    rows=rows,
    new_slots=NUM_NEW,
    length_bucket=BUCKET,
    stop_ids=stop_ids,
  )
  found = {index: ids.tolist() for index, ids in found}
  return [found[index] for index in range(len(requests))]


def test_greedy_equals_the_forward_without_a_cache(model):
  net, params = model
  forward = jax.jit(lambda tokens: net.apply({'params': params}, tokens))
  requests = _requests()
  for request, found in zip(requests, _run(model, requests), strict=True):
    assert len(found) == request.max_tokens
    text = np.zeros((1, max(LENGTHS) + NUM_NEW), np.int32)
    end = len(request.prompt)
    text[0, :end] = request.prompt
    for token in found:
      assert token == int(jnp.argmax(forward(text)[0, end - 1]))
      text[0, end] = token
      end += 1


HEAT = {'temperature': (3.0, 0.0, 2.0, 1.0, 3.0, 3.0, 2.0), 'top_p': [0.9] * 7}


@pytest.mark.parametrize('settings', [{}, HEAT], ids=['greedy', 'drawn'])
def test_a_request_is_answered_as_if_it_were_alone(model, settings):
  requests = _requests(**settings)
  together = _run(model, requests)
  order = [6, 2, 0, 5, 1, 4, 3]
  assert _run(model, [requests[i] for i in order]) == [
    together[i] for i in order
  ]
  assert _run(model, requests, rows=1) == together


def test_draws_follow_the_key(model):
  hot = {'temperature': [3.0] * 7}
  first, other = _requests(**hot), _requests(**hot)
  found = _run(model, first)
  assert _run(model, other) == found
  keys = [request.key for request in first]
  turned = [
    batcher.Request(r.prompt, key, r.max_tokens, 3.0)
    for r, key in zip(first, keys[1:] + keys[:1], strict=True)
  ]
  assert _run(model, turned) != found


def test_a_tiny_nucleus_is_greedy(model):
  narrow = _requests(temperature=[2.0] * 7, top_p=[1e-6] * 7)
  assert _run(model, narrow) == _run(model, _requests())


def test_a_row_ends_at_its_end_token(model):
  free = _run(model, _requests())
  ends = (free[0][2], free[4][0])
  for plain, found in zip(
    free, _run(model, _requests(), stop_ids=ends), strict=True
  ):
    stops = [i for i, token in enumerate(plain) if token in ends]
    assert found == plain[: stops[0] + 1 if stops else None]


def test_every_row_has_the_adapter_that_it_names(model, random_adapter):
  """Whose ranks and projections differ, and in a batch with the base."""
  net, _ = model
  adapters = [
    random_adapter(net.config, 2, ['q_proj', 'v_proj']),
    random_adapter(net.config, 3, ['down_proj', 'q_proj']),
  ]
  alone = [_run(model, _requests(), adapter=a) for a in (*adapters, None)]
  assert alone[0] != alone[1] and alone[1] != alone[2] != alone[0]
  choice = (1, 0, -1, 0, 1, 0, -1)
  mixed = _run(
    model,
    _requests(choice=choice),
    adapter=lora.side_by_side([*adapters, {}]),
  )
  assert mixed == [alone[c][row] for row, c in enumerate(choice)]


def test_requests_come_and_go_in_a_table_that_grows(model):
  requests = _requests()
  expected = dict(zip(requests, _run(model, requests), strict=True))
  table = batcher.Batcher(
    *model,
    rows=2,
    prompt_slots=BUCKET,
    new_slots=NUM_NEW,
    stop_ids=(),
    num_top=2,
  )
  found = {request: [] for request in requests}

  def note(news):
    for told in news:
      assert (told.new.logprobs == told.new.top_logprobs[:, 0]).all()
      found[told.request] += told.new.tokens.tolist()
      assert told.ended == (len(found[told.request]) == told.request.max_tokens)

  note(table.admit({}, requests[:2], shape=(2, BUCKET)))
  note(table.extend({}, num_steps=2, enough=2))
  table.grow(4)
  note(table.admit({}, requests[2:5], shape=(4, BUCKET)))
  dropped = requests[2]
  note(table.extend({}, num_steps=9, enough=4, dropped=[dropped]))
  assert not table.running and table.num_idle == 4
  assert len(found.pop(dropped)) == 1
  for request in (requests[i] for i in (0, 1, 3, 4)):
    assert found[request] == expected[request]


def test_shapes_are_few(model):
  programs = (stepper.read, stepper.extend)
  _run(model, _requests())
  before = [program._cache_size() for program in programs]
  fewer = _requests(temperature=[0.0] * 7)[:5]
  _run(model, fewer)
  assert [program._cache_size() for program in programs] == before


def test_a_step_writes_the_cache_in_place(model):
  """The donated cache is the result, and no program copies it."""
  net, params = model
  fixed = {'stop_ids': (), 'num_top': None, 'mesh': None, 'greedy': True}
  table = stepper.empty(net.config, rows=4, slots=300, mesh=None)
  bytes_held = sum(x.nbytes for x in jax.tree.leaves(table.cache))
  compiled = stepper.extend.lower(
    net,
    params,
    {},
    table,
    np.ones(4, bool),
    np.int32(4),
    prompt_slots=200,
    num_steps=100,
    **fixed,
  ).compile()
  memory = compiled.memory_analysis()
  assert memory.alias_size_in_bytes >= bytes_held
  assert memory.temp_size_in_bytes < bytes_held / 2
  keys = ','.join(map(str, table.cache.layers[0][0].shape))
  assert f'f32[{keys}]' in compiled.as_text()
  copies = [
    line
    for line in compiled.as_text().splitlines()
    if f'= f32[{keys}]' in line and ' copy(' in line
  ]
  assert not copies
