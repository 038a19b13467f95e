"""Keeps the rows of a table busy: a row that ends makes room for the next.

The one way to generate: `run` for prompts that are all there, as evaluation
and synthesis have them, and `Batcher` itself for requests that come and go, as
a server has them. Shapes are few: prompts are read in groups of one size and
padded to widths of a grid, and the table's size is its owner's choice.
"""

import collections
import dataclasses
from collections.abc import Collection, Iterator, Sequence

import jax
import numpy as np

from fedjax_safety import distributed, types
from fedjax_safety.models import decoder, sharding, stepper


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
  """A prompt and how to go on from it.

  Attributes:
    prompt: token ids, at least one.
    key: `uint32[2]`, data of the key from which its tokens are drawn.
    max_tokens: most tokens to add, at least one.
    temperature: 0 takes the likeliest token every time.
    top_p: nucleus of the draws, in (0, 1].
    choice: its adapter of several, -1 for none.
  """

  prompt: Sequence[int]
  key: np.ndarray
  max_tokens: int
  temperature: float = 0.0
  top_p: float = 1.0
  choice: int = -1


@dataclasses.dataclass(frozen=True)
class News:
  """What a request was given.

  Attributes:
    request: which one.
    new: its new tokens `[k]`, or their scores with leaves `[k, ...]`.
    ended: whether no more will come.
  """

  request: Request
  new: np.ndarray | stepper.Scores
  ended: bool


class Batcher:
  """A table of rows, and which request each of them is busy with."""

  def __init__(
    self,
    model: decoder.Decoder,
    base_params: types.BaseParams,
    *,
    rows: int,
    prompt_slots: int,
    new_slots: int,
    stop_ids: tuple[int, ...],
    num_top: int | None = None,
  ):
    """Makes a table of idle rows.

    Args:
      model: the decoder.
      base_params: its frozen parameters.
      rows: how many requests run at once.
      prompt_slots: longest prompt, in tokens.
      new_slots: most tokens that a request may be given.
      stop_ids: tokens that end a request; they are given too.
      num_top: how many of the likeliest tokens to give beside each new one and
        its log probability; None gives tokens alone.
    """
    self._model, self._base_params = model, base_params
    self._mesh = sharding.mesh_of(base_params)
    self.rows, self.prompt_slots = rows, prompt_slots
    self._new_slots = new_slots
    self._fixed = {'stop_ids': stop_ids, 'num_top': num_top, 'mesh': self._mesh}
    self._running: dict[int, Request] = {}
    self._given: dict[int, int] = {}
    self._table = stepper.empty(
      model.config,
      rows=rows,
      slots=prompt_slots + new_slots,
      mesh=self._mesh,
    )

  @property
  def running(self) -> Collection[Request]:
    """The requests that rows are busy with."""
    return tuple(self._running.values())

  @property
  def num_idle(self) -> int:
    """How many rows wait for a request."""
    return self.rows - len(self._running)

  def fits(self, request: Request) -> bool:
    """Whether the slots are enough for a request."""
    return (
      len(request.prompt) <= self.prompt_slots
      and request.max_tokens <= self._new_slots
    )

  @property
  def size(self) -> dict[str, int]:
    """The sizes that it was made with, rows added included."""
    return {
      'rows': self.rows,
      'prompt_slots': self.prompt_slots,
      'new_slots': self._new_slots,
    }

  def grow(self, rows: int) -> None:
    """Adds idle rows, up to `rows`."""
    self._table = stepper.grow(self._table, rows=rows, mesh=self._mesh)
    self.rows = rows

  def admit(
    self,
    adapter: types.Adapter,
    requests: Sequence[Request],
    *,
    shape: tuple[int, int],
  ) -> list[News]:
    """Puts requests into idle rows and draws the first token of each.

    Args:
      adapter: as for `stepper.read`, the same for all that runs at once.
      requests: no more than there are idle rows, each of which fits.
      shape: how many prompts of how many tokens to pad them to.
    """
    idle = [row for row in range(self.rows) if row not in self._running]
    taken = dict(zip(idle, requests, strict=False))
    count, width = shape
    tokens = np.zeros((count, width), np.int32)
    lengths = np.ones(count, np.int32)
    rows = np.full(count, self.rows, np.int32)
    rows[: len(taken)] = list(taken)
    for place, request in enumerate(requests):
      tokens[place, : len(request.prompt)] = request.prompt
      lengths[place] = len(request.prompt)
    self._running |= taken
    self._given |= dict.fromkeys(taken, 0)
    found, self._table = stepper.read(
      self._model,
      self._base_params,
      adapter,
      self._table,
      tokens,
      lengths,
      rows,
      _asked(requests, count),
      greedy=all(request.temperature == 0 for request in requests),
      **self._fixed,
    )
    found = jax.tree.map(lambda x: x[:, None], distributed.fetch(found))
    places = {row: place for place, row in enumerate(taken)}
    return [self._told(row, found, place) for row, place in places.items()]

  def extend(
    self,
    adapter: types.Adapter,
    *,
    num_steps: int,
    enough: int,
    dropped: Collection[Request] = (),
  ) -> list[News]:
    """Adds tokens to what runs, until enough rows are idle.

    Args:
      adapter: as for `admit`.
      num_steps: most tokens to add.
      enough: how many rows have to be idle for it to return before.
      dropped: running requests that nobody waits for any more; they end.
    """
    wanted = np.zeros(self.rows, bool)
    for row, request in list(self._running.items()):
      if request in dropped:
        del self._running[row]
      else:
        wanted[row] = True
    if not self._running:
      return []
    found, self._table = stepper.extend(
      self._model,
      self._base_params,
      adapter,
      self._table,
      wanted,
      np.int32(enough),
      prompt_slots=self.prompt_slots,
      num_steps=num_steps,
      greedy=all(request.temperature == 0 for request in self.running),
      **self._fixed,
    )
    found = distributed.fetch(found)
    return [self._told(row, found, row) for row in list(self._running)]

  def _told(self, row: int, found, place: int) -> News:
    """Returns a row's part of what was found, and frees the row if it ended."""
    request, whole = self._running[row], jax.tree.map(lambda x: x[place], found)
    tokens = whole if self._fixed['num_top'] is None else whole.tokens
    count = int(np.count_nonzero(tokens >= 0))
    self._given[row] += count
    ended = self._given[row] == request.max_tokens or (
      count > 0 and int(tokens[count - 1]) in self._fixed['stop_ids']
    )
    if ended:
      del self._running[row]
    return News(request, jax.tree.map(lambda x: x[:count], whole), ended)


def _asked(requests: Sequence[Request], count: int) -> stepper.Asked:
  """Returns what requests ask for, padded with greedy rows of one token."""
  padded = [*requests, *[Request((), np.zeros(2, np.uint32), 1)] * count]

  def column(name, dtype):
    return np.array([getattr(r, name) for r in padded[:count]], dtype)

  return stepper.Asked(
    keys=column('key', np.uint32),
    temperature=column('temperature', np.float32),
    top_p=column('top_p', np.float32),
    limit=column('max_tokens', np.int32),
    choice=column('choice', np.int32),
  )


def width_of(length: int, multiple: int) -> int:
  """Returns a length, rounded up to a multiple."""
  return -(-length // multiple) * multiple


def run(
  model: decoder.Decoder,
  base_params: types.BaseParams,
  adapter: types.Adapter,
  requests: Sequence[Request],
  *,
  rows: int,
  new_slots: int,
  length_bucket: int,
  stop_ids: tuple[int, ...],
) -> Iterator[tuple[int, np.ndarray]]:
  """Answers requests, and yields each as it ends.

  Short prompts come first, so that those read together are of one width; a
  quarter of the rows is read at a time.

  Args:
    model: the decoder.
    base_params: its frozen parameters.
    adapter: as for `stepper.read`.
    requests: what is asked.
    rows: how many run at once.
    new_slots: at least the most tokens of any request.
    length_bucket: prompts are padded to a multiple of this many tokens.
    stop_ids: tokens that end an answer.

  Yields:
    The index of a request and its new tokens, an end token included.
  """
  if not requests:
    return
  lengths = [len(request.prompt) for request in requests]
  table = Batcher(
    model,
    base_params,
    rows=rows,
    prompt_slots=width_of(max(lengths), length_bucket),
    new_slots=new_slots,
    stop_ids=stop_ids,
  )
  order = np.argsort(lengths, kind='stable').tolist()
  index_of = {id(requests[i]): i for i in order}
  waiting = collections.deque(requests[i] for i in order)
  group = -(-rows // 4)
  found = collections.defaultdict(list)
  while waiting or table.running:
    size = min(group, len(waiting))
    if size and table.num_idle >= size:
      read = [waiting.popleft() for _ in range(size)]
      width = width_of(len(read[-1].prompt), length_bucket)
      news = table.admit(adapter, read, shape=(group, width))
    else:
      news = table.extend(adapter, num_steps=new_slots, enough=size or rows)
    for told in news:
      index = index_of[id(told.request)]
      found[index].append(told.new)
      if told.ended:
        yield index, np.concatenate(found.pop(index))
