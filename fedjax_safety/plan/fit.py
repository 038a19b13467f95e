"""Which mesh, chunk and recomputation make a round fit, the fastest first.

A compilation takes a minute or more, so candidates are ranked by arithmetic
on sizes, and only the best are compiled.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import jax
import tqdm

from fedjax_safety import losses
from fedjax_safety import settings as settings_lib
from fedjax_safety.models import config as model_config
from fedjax_safety.models import sharding, weights
from fedjax_safety.plan import cost, topology

# Compilations before giving up.
MAX_COMPILED = 6

# Of one trained number: the number, its gradient, two moments, the delta.
_COPIES_OF_ADAPTER = 5
# Per token and layer without recomputation, activations kept: so many of the
# width of the model, of its MLP, and of its keys and values.
_KEPT_WIDTHS, _KEPT_MLPS, _KEPT_KEYS = 7, 4, 3


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A candidate, with what it is thought to need.

  Attributes:
    performance: the settings.
    memory: bytes of one device.
    seconds: of one local step of the cohort, in units that only compare.
  """

  performance: settings_lib.PerformanceConfig
  memory: float
  seconds: float


@dataclasses.dataclass(frozen=True)
class _Sizes:
  """Bytes and numbers that estimates are made of."""

  weights: int
  base: int
  layer: int
  adapter: int
  token_kept: int
  token_carried: int
  token_scores: int
  token_logits: int

  @classmethod
  def of(cls, config, model):
    """Returns the sizes of a model under an arm's settings."""
    width = model.dtype.itemsize
    table = weights.table(model)
    counts = {w.path: math.prod(w.shape) for w in table}
    stored = {
      path: n * (1 if model.quantization and path[-1] == 'kernel' else width)
      for path, n in counts.items()
    }
    layers = sum(n for path, n in stored.items() if path[0] == 'layers')
    at_once = config.client.batch_size * config.model.max_length
    columns = config.performance.loss_chunk or losses.chunk_of(
      model.vocab_size, at_once
    )
    sides = weights.projection_sizes(model)
    pairs = sum(sum(sides[m]) for m in config.lora.target_modules)
    keys = (model.num_heads + 2 * model.num_kv_heads) * model.head_width
    kept = _KEPT_WIDTHS * model.width + _KEPT_MLPS * model.mlp_width + keys
    return cls(
      weights=sum(counts.values()),
      base=sum(stored.values()),
      layer=layers // model.num_layers,
      adapter=4 * pairs * config.lora.rank * model.num_layers,
      token_kept=width * kept,
      token_carried=width * model.width,
      token_scores=width * model.num_heads * config.model.max_length,
      # In the dtype of the model, in float32, and its gradient.
      token_logits=(2 * width + 4) * min(columns, model.vocab_size),
    )


# Of devices whose figures are not known, the ratio of products to links.
_UNKNOWN = topology.Chip('unknown', math.inf, 2e14, 8e11, 2e11)


def _meshes(
  config: settings_lib.ExperimentConfig,
  model: model_config.DecoderConfig,
  count: int,
) -> Iterator[tuple[int, int, int]]:
  """Yields the sizes of every mesh of all devices that divides the run."""
  client = config.client
  sizes = [n for n in range(1, count + 1) if count % n == 0]
  for clients, fsdp in itertools.product(sizes, sizes):
    if count % (clients * fsdp):
      continue
    mesh = (clients, fsdp, count // (clients * fsdp))
    if client.cohort_size % clients or client.batch_size % fsdp:
      continue
    try:
      sharding.check_divisible(
        model, jax.sharding.AbstractMesh(mesh, sharding.AXES)
      )
    except ValueError:
      continue
    yield mesh


def base_share(
  config: settings_lib.ExperimentConfig, model: model_config.DecoderConfig
) -> int:
  """Returns the least bytes of frozen weights that a device can hold."""
  _, fsdp, tp = config.performance.mesh
  return _Sizes.of(config, model).base // (fsdp * tp)


def estimate(
  config: settings_lib.ExperimentConfig,
  model: model_config.DecoderConfig,
  device: jax.Device,
  performance: settings_lib.PerformanceConfig,
) -> Estimate:
  """Returns what a round is thought to need, rather too much than too little.

  Args:
    config: the arm's settings.
    model: the model's sizes.
    device: one of those the round would run on.
    performance: instead of the settings' own.
  """
  sizes, chip = _Sizes.of(config, model), topology.chip_of(device) or _UNKNOWN
  (clients, fsdp, tp), client = performance.mesh, config.client
  chunk = performance.clients_per_chunk or client.cohort_size
  tokens = client.batch_size * config.model.max_length
  at_once = chunk * tokens / (clients * fsdp)
  layers = model.num_layers
  kept = (sizes.token_kept + sizes.token_scores) / tp
  activations = (
    layers * sizes.token_carried + 2 * kept
    if performance.remat
    else layers * kept
  )
  memory = (
    sizes.base / (fsdp * tp)
    + 2 * sizes.layer / tp
    + _COPIES_OF_ADAPTER * chunk / clients * sizes.adapter / (fsdp * tp)
    + 2 * client.cohort_size / clients * sizes.adapter / (fsdp * tp)
    + at_once * (activations + sizes.token_logits / tp)
  )
  passes, chunks = 3 if performance.remat else 2, client.cohort_size // chunk
  operations = 2 * passes * sizes.weights * tokens * client.cohort_size
  gathered = chunks * passes * sizes.base / tp * (fsdp - 1) / fsdp
  # Two sums a pass and layer, each there and back.
  summed = 4 * passes * layers * sizes.token_carried * (tp - 1) / tp
  sent = gathered + chunks * at_once * summed
  seconds = operations / math.prod(performance.mesh) / chip.flops
  return Estimate(performance, memory, seconds + sent / chip.link_bandwidth)


def candidates(
  config: settings_lib.ExperimentConfig,
  model: model_config.DecoderConfig,
  device: jax.Device,
  count: int,
) -> list[Estimate]:
  """Returns every way to lay a round out on so many devices, fastest first."""
  cohort, found = config.client.cohort_size, []
  for mesh in _meshes(config, model, count):
    chunks = [n for n in range(mesh[0], cohort + 1, mesh[0]) if cohort % n == 0]
    for chunk, remat in itertools.product(chunks, (False, True)):
      performance = dataclasses.replace(
        config.performance,
        mesh=mesh,
        clients_per_chunk=0 if chunk == cohort else chunk,
        remat=remat,
      )
      found.append(estimate(config, model, device, performance))
  # Of equals, the one with more memory to spare.
  return sorted(found, key=lambda e: (e.seconds, e.memory))


def propose(
  config: settings_lib.ExperimentConfig,
  model: model_config.DecoderConfig,
  devices: Sequence[jax.Device],
  *,
  at_hand: bool,
  memory: int | None = None,
) -> cost.Plan:
  """Returns the plan of the fastest candidate whose compiled round fits.

  If none of those compiled fits, the plan of the one that needs least.

  Args:
    config: the arm's settings; what `performance` says of mesh, chunk and
      recomputation is replaced.
    model: the model's sizes.
    devices: all of them are used.
    at_hand: whether they are this machine's.
    memory: bytes a device has, if not what is known of its kind.

  Raises:
    ValueError: no mesh of so many devices divides the run.
  """
  ranked = candidates(config, model, devices[0], len(devices))
  if not ranked:
    client = config.client
    raise ValueError(
      f'no mesh of {len(devices)} devices divides '
      f'client.cohort_size={client.cohort_size}, client.batch_size='
      f'{client.batch_size} and the model; change one of them'
    )
  limit = memory or cost.limit_of(devices[0], len(devices)) or math.inf
  likely = [e for e in ranked if e.memory <= limit]
  # An estimate may be too high: what needs least is tried in any case.
  least = min(ranked, key=lambda e: e.memory)
  tried = [*likely[: MAX_COMPILED - 1], least]
  best = None
  # With None, tqdm shows the bar on terminals only.
  for candidate in tqdm.tqdm(
    dict.fromkeys(tried), 'Compiling candidates', disable=None
  ):
    chosen = dataclasses.replace(config, performance=candidate.performance)
    plan = cost.measure(chosen, model, devices, at_hand=at_hand, memory=memory)
    if plan.fits:
      return plan
    if best is None or plan.memory.total < best.memory.total:
      best = plan
  return best
