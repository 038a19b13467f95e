"""What clients do besides their optimizer's steps, and what is kept for it.

FedAvg does nothing. FedProx pulls each client back to the server's adapter.
SCAFFOLD corrects each client's gradients by how they are known to differ from
all clients' gradients. Both are a correction of the gradient in a local step.
So is Lisa, whose clients take turns between data of the server and their own.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_safety import _validate, tree, types

# (gradients, adapter now, adapter that the server sent or that the client had
# when it last changed data, what else was sent to this client) -> gradients.
Correct = Callable[..., types.Adapter]


class ClientAlgorithm(NamedTuple):
  """A client algorithm as pure functions, in the order of a round.

  Attributes:
    init: `(adapter) -> state`, what the federation keeps for it.
    send: `(state, client_id) -> sent`, a tree with leading axis C.
    correct: `(grads, adapter, start, sent) -> grads` in a local step of one
      client, whose row of `sent` it gets; None leaves gradients alone.
    receive: `(state, client_id, deltas, length) -> state`, from the deltas
      that clients claim and the sum of their steps' learning rates.
    aligns: `(S) -> bool[S]`, which local steps of honest clients take aligned
      pairs that the server sent. Malicious clients then do as they like: they
      neither take them nor correct. None takes no such step.
  """

  init: Callable[[types.Adapter], types.PyTree]
  send: Callable[..., types.PyTree]
  correct: Correct | None
  receive: Callable[..., types.PyTree]
  aligns: Callable[[int], np.ndarray] | None = None


class ScaffoldState(NamedTuple):
  """The control variates of SCAFFOLD.

  Attributes:
    server: c, leaves [...].
    clients: c_i of the whole population by client id, leaves [N, ...].
  """

  server: types.Adapter
  clients: types.PyTree


def _keeps_nothing(correct: Correct | None) -> ClientAlgorithm:
  """Returns an algorithm that needs no state."""
  return ClientAlgorithm(
    init=lambda adapter: (),
    send=lambda state, client_id: (),
    correct=correct,
    receive=lambda state, *args: state,
  )


def fedavg() -> ClientAlgorithm:
  """Returns the algorithm of McMahan et al.: clients follow their own data.

  Reference: McMahan, Moore, Ramage, Hampson, Aguera y Arcas. Communication-
  Efficient Learning of Deep Networks from Decentralized Data. AISTATS 2017.
  """
  return _keeps_nothing(None)


def fedprox(*, mu: float = 0.01) -> ClientAlgorithm:
  """Returns the algorithm that pulls clients to the server's adapter.

  Adds `mu * (w - w_t)` to the gradient at w, that of `mu / 2 * |w - w_t|^2`.
  Any optimizer may take the step; the first one is FedAvg's.

  Args:
    mu: strength of the pull, above 0.

  Raises:
    ValueError: `mu` is out of range.

  Reference: Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith. Federated
  Optimization in Heterogeneous Networks. MLSys 2020.
  """
  _validate.positive(mu=mu)
  return _keeps_nothing(functools.partial(_pull, mu))


def _pull(mu, grads, adapter, start, sent):
  """Adds the gradient of `mu / 2 * |w - start|^2`."""
  del sent
  return jax.tree.map(
    lambda g, w, w_t: g + mu * (w - w_t), grads, adapter, start
  )


def lisa(
  *, mu: float = 1.0, alignment_steps: int = 1, own_steps: int = 4
) -> ClientAlgorithm:
  """Returns the algorithm of two states: on aligned data, and on its own.

  Honest clients take steps on aligned pairs of the server, then on their own
  data, and so on in turn. In either state they are pulled, as in FedProx, to
  where they were when they entered it. Malicious clients train on their own
  data alone, without a pull.

  Args:
    mu: strength of the pull, above 0.
    alignment_steps: local steps in a row on the server's pairs.
    own_steps: local steps in a row on the client's own data.

  Raises:
    ValueError: a value is out of range.

  Reference: Huang, Hu, Ilhan, Tekin, Liu. Lisa: Lazy Safety Alignment for
  Large Language Models against Harmful Fine-tuning Attack. NeurIPS 2024.
  """
  _validate.positive(
    mu=mu, alignment_steps=alignment_steps, own_steps=own_steps
  )

  def aligns(num_steps):
    turn = np.arange(num_steps) % (alignment_steps + own_steps)
    return turn < alignment_steps

  algorithm = _keeps_nothing(functools.partial(_pull, mu))
  return algorithm._replace(aligns=aligns)


def scaffold(*, population: int) -> ClientAlgorithm:
  """Returns the algorithm that corrects gradients by control variates.

  A local step follows `g - c_i + c`. After K steps of SGD of rate r from w_t
  to w_i the client's variate is `c_i - c + (w_t - w_i) / (K r)` (option II),
  and the server's moves by the sum of the cohort's changes over N. All start
  at 0.

  The server works out a client's variate from the delta that the client
  claims, so that a malicious client's is whatever it makes of it. A row whose
  change is not finite changes nothing. Other rows go into c as they are,
  whatever rule aggregates the deltas: one client can move c without bound.

  Args:
    population: N, all clients there are.

  Raises:
    ValueError: `population` is not positive.

  Reference: Karimireddy, Kale, Mohri, Reddi, Stich, Suresh. SCAFFOLD:
  Stochastic Controlled Averaging for Federated Learning. ICML 2020.
  """
  _validate.positive(population=population)

  def init(adapter):
    server = jax.tree.map(jnp.zeros_like, adapter)
    clients = jax.tree.map(
      # A broadcast keeps the layout that the leaf has on a mesh.
      lambda c: jnp.broadcast_to(c, (population, *c.shape)),
      server,
    )
    return ScaffoldState(server, clients)

  def send(state, client_id):
    return jax.tree.map(
      lambda c, rows: c - rows[client_id], state.server, state.clients
    )

  def correct(grads, adapter, start, sent):
    del adapter, start
    return jax.tree.map(jnp.add, grads, sent)

  def receive(state, client_id, deltas, length):
    change = jax.tree.map(lambda c, d: -c - d / length, state.server, deltas)
    nothing = jax.tree.map(jnp.zeros_like, change)
    change = tree.where_rows(tree.finite_rows(change), change, nothing)
    return ScaffoldState(
      jax.tree.map(
        lambda c, x: c + jnp.sum(x, axis=0) / population, state.server, change
      ),
      jax.tree.map(
        lambda rows, x: rows.at[client_id].add(x), state.clients, change
      ),
    )

  return ClientAlgorithm(init, send, correct, receive)


def correction(
  algorithm: ClientAlgorithm,
  received: types.PyTree,
  deviates: jax.Array | None,
  num_steps: int,
) -> dict[str, Any]:
  """Returns what `client_update.local_update` needs of one client, if any.

  Args:
    algorithm: of all clients.
    received: this client's row of what `send` returned.
    deviates: bool, whether it does not do as it is told; only looked at where
      the algorithm has steps on the server's pairs.
    num_steps: S.
  """
  if algorithm.correct is None:
    return {}

  def correct(grads, adapter, start):
    return algorithm.correct(grads, adapter, start, received)

  if algorithm.aligns is None:
    return {'correct': correct}
  aligns = algorithm.aligns(num_steps)
  switches = np.concatenate([[False], aligns[1:] != aligns[:-1]])

  def correct_honest(grads, adapter, start):
    return jax.tree.map(
      functools.partial(jnp.where, deviates),
      grads,
      correct(grads, adapter, start),
    )

  return {'correct': correct_honest, 'switches': jnp.asarray(switches)}


ALGORITHMS = {
  'fedavg': fedavg,
  'fedprox': fedprox,
  'scaffold': scaffold,
  'lisa': lisa,
}


def sends_pairs(name: str) -> bool:
  """Whether a server sends clients aligned pairs with an algorithm."""
  return name == 'lisa'


def build(name: str, *, population: int, **kwargs: Any) -> ClientAlgorithm:
  """Returns a client algorithm by name.

  Args:
    name: fedavg, fedprox, scaffold or lisa.
    population: N, for those that keep something of every client.
    **kwargs: `mu` (fedprox, lisa), `alignment_steps`, `own_steps` (lisa).

  Raises:
    ValueError: the name or an argument is unknown, or a value is out of
      range.
  """
  _validate.one_of(ALGORITHMS, client_algorithm=name)
  function = ALGORITHMS[name]
  known = inspect.signature(function).parameters
  given = {'population': population} if 'population' in known else {}
  _validate.keywords(f'client algorithm {name!r}', function, kwargs, given)
  return function(**given, **kwargs)


def check_optimizer(
  name: str, *, optimizer: str, final_learning_rate: float
) -> None:
  """Raises unless an algorithm can work with the clients' optimizer.

  SCAFFOLD reads the mean gradient of a client off its change, which is that
  only after plain SGD steps of a known rate above 0. The others take any.

  Args:
    name: fedavg, fedprox, scaffold or lisa.
    optimizer: name of the clients' optimizer.
    final_learning_rate: the least rate of a round.
  """
  if name != 'scaffold':
    return
  if optimizer != 'sgd':
    raise ValueError(
      f"client.algorithm='scaffold' needs client.optimizer='sgd', off whose "
      f'steps it reads gradients; got {optimizer!r}'
    )
  if not final_learning_rate > 0:
    raise ValueError(
      f"client.algorithm='scaffold' needs client.final_learning_rate above 0, "
      f'as it divides by the rate of a round; got {final_learning_rate}'
    )
