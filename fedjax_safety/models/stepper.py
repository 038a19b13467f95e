"""The programs of generation: read prompts, add tokens, score given tokens.

A table has B rows, each busy with one request or idle. `read` puts prompts
into some rows, `extend` adds tokens to all that are busy, and returns as soon
as enough of them have ended for others to take their places. The table is
donated to both, so that its cache is written in place. Shapes in comments: P
prompts, L tokens, K steps, A alternatives, T slots, V vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_safety import types
from fedjax_safety.models import config as config_lib
from fedjax_safety.models import decoder, kv_cache, sharding


class Scores(NamedTuple):
  """Tokens with what the model gave them.

  Attributes:
    tokens: `int32[B, K]`.
    logprobs: `float32[B, K]`, their log probabilities.
    top_tokens: `int32[B, K, A]`, the likeliest in their places.
    top_logprobs: `float32[B, K, A]`.
  """

  tokens: jax.Array
  logprobs: jax.Array
  top_tokens: jax.Array
  top_logprobs: jax.Array


class Asked(NamedTuple):
  """What each row was asked for, whatever its neighbors were.

  Attributes:
    keys: `uint32[B, 2]`, data of the key that it draws from.
    temperature: `float32[B]`, 0 for the likeliest token every time.
    top_p: `float32[B]`, nucleus of the draws.
    limit: `int32[B]`, most tokens to add, at least 1.
    choice: `int32[B]`, its adapter of several, -1 for none.
  """

  keys: jax.Array
  temperature: jax.Array
  top_p: jax.Array
  limit: jax.Array
  choice: jax.Array


class Table(NamedTuple):
  """Rows that grow.

  Attributes:
    cache: of the tokens read.
    asked: what each row was asked for.
    token: `int32[B]`, drawn last and not read yet.
    position: `int32[B]`, where that token goes.
    drawn: `int32[B]`, how many tokens were drawn.
    busy: `bool[B]`, whether the row goes on.
    turn: `int32[]`, which of the slots for new tokens is next.
  """

  cache: kv_cache.Cache
  asked: Asked
  token: jax.Array
  position: jax.Array
  drawn: jax.Array
  busy: jax.Array
  turn: jax.Array


@functools.partial(jax.jit, static_argnames=('config', 'rows', 'slots', 'mesh'))
def empty(
  config: config_lib.DecoderConfig,
  *,
  rows: int,
  slots: int,
  mesh: jax.sharding.Mesh | None,
) -> Table:
  """Returns a table of idle rows, B, with so many slots in its cache, T."""
  numbers = jnp.zeros(rows, jnp.int32)
  numbered = jnp.zeros(rows, jnp.float32)
  keys = jnp.zeros((rows, 2), jnp.uint32)
  return _laid_out(
    Table(
      cache=kv_cache.empty(config, rows, slots),
      asked=Asked(keys, numbered, numbered, numbers, numbers),
      token=numbers,
      position=numbers,
      drawn=numbers,
      busy=jnp.zeros(rows, bool),
      turn=jnp.int32(0),
    ),
    mesh,
  )


@functools.partial(jax.jit, static_argnames=('rows', 'mesh'))
def grow(table: Table, *, rows: int, mesh: jax.sharding.Mesh | None) -> Table:
  """Returns the table with idle rows added, up to `rows`, B."""

  def pad(leaf):
    extra = rows - len(leaf)
    return jnp.pad(leaf, ((0, extra), *[(0, 0)] * (leaf.ndim - 1)))

  return _laid_out(jax.tree.map(lambda x: pad(x) if x.ndim else x, table), mesh)


def _laid_out(table: Table, mesh: jax.sharding.Mesh | None) -> Table:
  """Splits the cache over a mesh, the same after every program."""
  layers = sharding.by_row(table.cache.layers, mesh)
  return table._replace(cache=table.cache._replace(layers=layers))


def keep_top_p(logits: jax.Array, top_p: jax.Array) -> jax.Array:
  """Masks tokens outside the smallest set whose probability reaches top_p.

  Ties with the last token of the set stay in it; top_p 1 masks nothing.
  """
  ordered = jnp.sort(logits, axis=-1)[..., ::-1]
  probability = jax.nn.softmax(ordered, axis=-1)
  mass = jnp.cumsum(probability, axis=-1)
  # The token that crosses top_p stays in, so at least one always does.
  last = jnp.sum(mass - probability < top_p, -1) - 1
  cut = jnp.take_along_axis(ordered, jnp.maximum(last, 0)[..., None], axis=-1)
  return jnp.where((logits < cut) & (top_p < 1), -jnp.inf, logits)


def _pick(logits, asked: Asked, drawn, greedy: bool) -> jax.Array:
  """Returns each row's next token, from its own key and how many it drew."""
  likeliest = jnp.argmax(logits, axis=-1)
  if greedy:
    return likeliest
  heat = jnp.maximum(asked.temperature, 1e-6)[:, None]
  kept = keep_top_p(logits / heat, asked.top_p[:, None])
  keys = jax.random.wrap_key_data(asked.keys)
  keys = jax.vmap(jax.random.fold_in)(keys, drawn)
  chosen = jax.vmap(jax.random.categorical)(keys, kept)
  return jnp.where(asked.temperature > 0, chosen, likeliest)


def _scored(
  logits: jax.Array, tokens: jax.Array, num_top: int | None
) -> Scores | jax.Array:
  """Returns tokens `[...]`, scored under logits `[..., V]` if asked for."""
  if num_top is None:
    return tokens
  logprobs = jax.nn.log_softmax(logits)
  own = jnp.take_along_axis(logprobs, tokens[..., None], -1)[..., 0]
  top_logprobs, top_tokens = jax.lax.top_k(logprobs, num_top)
  return Scores(tokens, own, top_tokens, top_logprobs)


def _goes_on(token, drawn, asked: Asked, stop_ids: tuple[int, ...]):
  """Returns whether rows that just drew a token are to draw another."""
  ended = jnp.isin(token, jnp.asarray(stop_ids, jnp.int32))
  return ~ended & (drawn < asked.limit)


@functools.partial(
  jax.jit,
  static_argnames=('model', 'stop_ids', 'num_top', 'greedy', 'mesh'),
  donate_argnames='table',
)
def read(
  model: decoder.Decoder,
  base_params: types.BaseParams,
  adapter: types.Adapter,
  table: Table,
  tokens: jax.Array,
  lengths: jax.Array,
  rows: jax.Array,
  asked: Asked,
  *,
  stop_ids: tuple[int, ...],
  num_top: int | None,
  greedy: bool,
  mesh: jax.sharding.Mesh | None,
) -> tuple[Scores | jax.Array, Table]:
  """Reads prompts into idle rows and draws the first token of each.

  Args:
    model: the decoder.
    base_params: its frozen parameters.
    adapter: the adapter of all rows, an empty tree for none; or several, whose
      leaves are `[layers, M, ...]`, for `asked.choice` to choose from.
    table: the table; donated.
    tokens: `int32[P, L]`, prompts padded on the right, L at most T.
    lengths: `int32[P]`, tokens of each prompt, at least one.
    rows: `int32[P]`, where each goes; B drops a prompt that only pads.
    asked: of each prompt.
    stop_ids: tokens that end a row.
    num_top: how many of the likeliest tokens to give, None for tokens alone.
    greedy: whether no row has a temperature, which saves drawing.
    mesh: over which the cache is split.

  Returns:
    The `[P]` first tokens, with their scores unless `num_top` is None, and the
    table.
  """
  places = jnp.minimum(jnp.arange(tokens.shape[1]), lengths[:, None] - 1)
  logits, kept = model.apply(
    {'params': base_params, 'lora': adapter},
    tokens,
    places,
    choice=_choice(adapter, asked),
    last_only=lengths - 1,
    keep=True,
  )
  token = _pick(logits, asked, jnp.zeros_like(lengths), greedy)

  def put(old, new):
    return old.at[rows].set(new, mode='drop')

  table = Table(
    cache=kv_cache.replace_rows(table.cache, rows, kept, lengths),
    asked=jax.tree.map(put, table.asked, asked),
    token=put(table.token, token),
    position=put(table.position, lengths),
    drawn=put(table.drawn, 1),
    busy=put(table.busy, _goes_on(token, 1, asked, stop_ids)),
    turn=table.turn,
  )
  return _scored(logits, token, num_top), _laid_out(table, mesh)


def _choice(adapter: types.Adapter, asked: Asked) -> jax.Array | None:
  """Returns each row's choice if there are several adapters."""
  leaves = jax.tree.leaves(adapter)
  return asked.choice if leaves and leaves[0].ndim == 4 else None


@functools.partial(
  jax.jit,
  static_argnames=(
    'model',
    'prompt_slots',
    'num_steps',
    'stop_ids',
    'num_top',
    'greedy',
    'mesh',
  ),
  donate_argnames='table',
)
def extend(
  model: decoder.Decoder,
  base_params: types.BaseParams,
  adapter: types.Adapter,
  table: Table,
  wanted: jax.Array,
  enough: jax.Array,
  *,
  prompt_slots: int,
  num_steps: int,
  stop_ids: tuple[int, ...],
  num_top: int | None,
  greedy: bool,
  mesh: jax.sharding.Mesh | None,
) -> tuple[Scores | jax.Array, Table]:
  """Adds tokens to every busy row, until enough rows are idle.

  Guarantees: greedy tokens are the argmax of the forward without a cache; a
  row depends on its own prompt, adapter, key and settings alone.

  Args:
    model: the decoder.
    base_params: its frozen parameters.
    adapter: as for `read`.
    table: the table; donated.
    wanted: `bool[B]`, rows that somebody still waits for.
    enough: `int32[]`, how many rows have to be idle for it to return.
    prompt_slots: slots for prompts, at most T less the longest `limit`; new
      tokens take the others in turn.
    num_steps: most tokens to add, K.
    stop_ids: tokens that end a row.
    num_top: as for `read`.
    greedy: as for `read`.
    mesh: as for `read`.

  Returns:
    `[B, K]` tokens, with their scores unless `num_top` is None, -1 where none
    was added, and the table.
  """
  variables = {'params': base_params, 'lora': adapter}
  model = model.clone(mesh=mesh)
  ring = table.cache.held.shape[1] - prompt_slots
  asked = table.asked

  def proceed(carry):
    step, table, _ = carry
    return (step < num_steps) & (jnp.sum(~table.busy) < enough)

  def advance(carry):
    step, table, out = carry
    logits, cache = model.apply(
      variables,
      table.token[:, None],
      table.position[:, None],
      cache=table.cache,
      slot=prompt_slots + table.turn,
      choice=_choice(adapter, asked),
    )
    logits = logits[:, 0]
    token = _pick(logits, asked, table.drawn, greedy)
    scores = _scored(logits, jnp.where(table.busy, token, -1), num_top)
    out = jax.tree.map(lambda o, s: o.at[:, step].set(s), out, scores)
    added = table.busy.astype(jnp.int32)
    drawn = table.drawn + added
    busy = table.busy & _goes_on(token, drawn, asked, stop_ids)
    table = Table(
      cache=cache,
      asked=asked,
      token=token,
      position=table.position + added,
      drawn=drawn,
      busy=busy,
      turn=(table.turn + 1) % ring,
    )
    return step + 1, _laid_out(table, mesh), out

  rows = len(table.token)
  out = jax.tree.map(
    lambda x: jnp.full((rows, num_steps, *x.shape[1:]), -1, x.dtype),
    jax.eval_shape(
      lambda: _scored(
        jnp.zeros((rows, model.config.vocab_size)), table.token, num_top
      )
    ),
  )
  table = table._replace(busy=table.busy & wanted)
  _, table, out = jax.lax.while_loop(
    proceed, advance, (jnp.int32(0), table, out)
  )
  return out, table


@functools.partial(jax.jit, static_argnames=('model', 'num_top'))
def score(
  model: decoder.Decoder,
  base_params: types.BaseParams,
  adapter: types.Adapter,
  tokens: jax.Array,
  *,
  num_top: int,
) -> Scores:
  """Scores every token but the first of right-padded rows.

  Rows are taken one after the other: the logits of one row at a time are in
  memory.

  Args:
    model: the decoder.
    base_params: its frozen parameters.
    adapter: its adapter; an empty tree for none.
    tokens: `int32[B, L]`.
    num_top: how many of the likeliest tokens to give, A.

  Returns:
    Scores of `[B, L - 1]` tokens.
  """
  variables = {'params': base_params, 'lora': adapter}

  def one(row):
    logits = model.apply(variables, row[None])[0, :-1]
    return _scored(logits, row[1:], num_top)

  return jax.lax.map(one, tokens)
