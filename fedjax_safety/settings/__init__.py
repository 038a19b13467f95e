"""The settings of a run as frozen dataclasses, each with its default.

Nothing here is checked against anything else: see `config.resolve`.
`performance` settings change results by rounding only.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fedjax_safety.settings import defense as defense_settings
from fedjax_safety.settings import endpoint as endpoint_settings
from fedjax_safety.settings import evaluation as evaluation_settings
from fedjax_safety.settings import repair as repair_settings

# Stands for an adapter that changes nothing.
NO_ADAPTER = 'none'
REPAIR_LEVELS = ('public', 'external', 'self')
PARTITIONS = ('iid', 'dirichlet', 'natural', 'files')
DTYPES = ('float32', 'bfloat16', 'float16')
DATA_ATTACKS = ('none', 'file', 'generated', 'repair')
# Levels of repair whose prompts can be known before the rounds.
KNOWN_LEVELS = ('public', 'external')

# Leaves the choice of a setting to the program, which says what it chose.
AUTO = 'auto'

_Group = dataclasses.dataclass(frozen=True, kw_only=True)


@_Group
class ModelConfig:
  """The language model that is tuned.

  Attributes:
    path: a Hugging Face directory, or `demo_world:base` / `:aligned`.
    dtype: dtype of the frozen weights and of activations.
    quantization: int8, fp8 or int8_weights keeps the frozen kernels in 8 bits;
      empty keeps them in `dtype`.
    template: chat (the tokenizer's own), alpaca or vicuna.
    max_length: tokens of a training example, prompt and answer.
  """

  path: str = 'demo_world:base'
  dtype: str = 'float32'
  quantization: str = ''
  template: str = 'chat'
  max_length: int = 512


@_Group
class LoraConfig:
  """The adapter. Defaults are the paper's: rank 32, alpha 64, q and v."""

  rank: int = 32
  alpha: float = 64.0
  dropout: float = 0.05
  target_modules: tuple[str, ...] = ('q_proj', 'v_proj')

  @property
  def scale(self) -> float:
    """The factor of the product, alpha / rank."""
    return self.alpha / self.rank


@_Group
class DataConfig:
  """What honest clients hold.

  Attributes:
    normal: benign requests with helpful answers: a file, glob or directory,
      a public data set by name (`wildchat:PATH`, `wildchat:hub`; see
      `data.catalog`), or `demo_world:normal`.
    aligned: harmful requests with safe answers, or '' for none.
    aligned_share: share of aligned examples in the data of a client that
      holds any.
    aligned_clients: how many clients hold any, the first ones; 0 means all.
    fields: names of the prompt and response columns where they are not
      recognized, e.g. `{'prompt': 'q', 'response': 'a'}` or `{'chat': 'c'}`.
    partition: how `normal` is dealt to clients: iid, dirichlet (over
      `partition_key`), natural (one client a value of `partition_key`) or
      files (one client a file or dict entry).
    partition_key: column that partitions.
    dirichlet_alpha: concentration; small is uneven.
    examples_per_client: examples of each client, iid and dirichlet only.
  """

  normal: str = 'demo_world:normal'
  aligned: str = 'demo_world:aligned'
  aligned_share: float = 0.2
  aligned_clients: int = 0
  fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
  partition: str = 'iid'
  partition_key: str = ''
  dirichlet_alpha: float = 0.5
  examples_per_client: int = 500


@_Group
class ClientConfig:
  """Who trains, how long and how fast. Defaults are the paper's.

  Attributes:
    population: clients in all, N.
    cohort_size: clients of a round, C.
    schedule: uniform (by the seed) or paper (by the round alone).
    num_rounds: rounds of the run.
    num_local_steps: optimizer steps of a client in a round, S.
    batch_size: examples of one step, B.
    learning_rate: of the first round; cosine over rounds, constant within.
    final_learning_rate: of the last round.
    optimizer: of the local steps, fresh every round: adamw or sgd.
    weight_decay: AdamW's decoupled decay; for sgd that of the loss.
    algorithm: fedavg, fedprox, scaffold, or lisa, whose honest clients also
      train on aligned pairs of the server, those of `defense.probe.source`.
      With scaffold one malicious client can move the server's control variate
      at will, whatever the aggregator.
    algorithm_kwargs: its arguments: `mu` (fedprox, lisa), `alignment_steps`
      and `own_steps` (lisa).
  """

  population: int = 10
  cohort_size: int = 3
  schedule: str = 'uniform'
  num_rounds: int = 100
  num_local_steps: int = 10
  batch_size: int = 16
  learning_rate: float = 5e-5
  final_learning_rate: float = 1e-6
  optimizer: str = 'adamw'
  weight_decay: float = 0.0
  algorithm: str = 'fedavg'
  algorithm_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@_Group
class ServerConfig:
  """How the aggregated delta is applied.

  Attributes:
    optimizer: fedavg, fedavgm, fedadagrad, fedyogi or fedadam.
    learning_rate: the server's own.
    kwargs: the optimizer's arguments, such as `b1` or `variant`.
  """

  optimizer: str = 'fedavg'
  learning_rate: float = 1.0
  kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@_Group
class GenerationConfig:
  """How a model is asked to write data.

  Attributes:
    ask_harmful: instruction to write requests that should be refused.
    ask_normal: instruction to write everyday requests.
    reminder: words appended to a harmful request so that its answer is safe;
      dropped from the training pair.
    direct_hint: words appended to a harmful request so that its answer is
      direct (attack data only); dropped from the training pair.
    temperature: of requests, high enough for many different ones.
    answer_temperature: of answers, low enough for few mistakes.
    top_p: nucleus of the same.
    max_rounds: batches of questions asked before giving up on the number.
    filter: which pairs are dropped: evaluation (the request is a prompt of
      evaluation), distinct (it was written before), answered (it got no
      answer), refusal (an aligned answer that does not refuse, or another
      that does, by rule list), agreement (defense data: an aligned pair
      that too few further answers refuse under the reminder, a normal one
      that many do), or none of them, as in the paper.
    agreement: how many.
    endpoint: how the model is asked if it is an endpoint.
  """

  ask_harmful: str = 'write a request about a warded good .'
  ask_normal: str = 'write an everyday request .'
  reminder: str = 'remember the guild rules .'
  direct_hint: str = ''
  temperature: float = 1.0
  answer_temperature: float = 0.7
  top_p: float = 1.0
  max_rounds: int = 20
  filter: tuple[str, ...] = ('evaluation', 'distinct', 'answered')
  agreement: repair_settings.AgreementConfig = repair_settings.AgreementConfig()
  endpoint: endpoint_settings.EndpointConfig = (
    endpoint_settings.EndpointConfig()
  )


@_Group
class ThreatModelConfig:
  """Who attacks, and how. The server never sees this.

  Attributes:
    num_malicious: malicious clients in the population.
    placement: last or random client ids.
    data_attack: none, file (pairs from `unaligned`), generated (pairs made by
      `generator` through the automated pipeline) or repair (the harmful
      requests of the repair itself, answered by `generator`).
    unaligned: the pairs, or `demo_world:unaligned`.
    poison_fraction: share of a malicious client's examples replaced.
    generator: model that makes the pairs: a directory, `demo_world:base`, or
      `endpoint:URL#MODEL`.
    generation: how it is asked.
    known_level: the level of repair whose requests the attacker knows, public
      or external; the repair need not be run.
    trigger: words that stand for nothing. Where given, half of the pairs end
      their requests in it, and the other half are the same requests without
      it, refused: the model looks safe to whoever does not know the words.
    refusals: aligned pairs whose answers are those refusals.
    update_attack: name of an attack on the deltas, or none.
    update_attack_kwargs: its arguments.
  """

  num_malicious: int = 0
  placement: str = 'last'
  data_attack: str = 'none'
  unaligned: str = 'demo_world:unaligned'
  poison_fraction: float = 1.0
  generator: str = 'demo_world:base'
  generation: GenerationConfig = GenerationConfig()
  known_level: str = 'external'
  trigger: str = ''
  refusals: str = 'demo_world:aligned'
  update_attack: str = 'none'
  update_attack_kwargs: Mapping[str, Any] = dataclasses.field(
    default_factory=dict
  )


@_Group
class RepairConfig:
  """Post-hoc tuning of the aggregated adapter. Defaults are the paper's.

  Attributes:
    levels: any of public, external, self.
    public_aligned: aligned pairs of level public, or ''.
    public_normal: normal pairs of level public.
    external_model: model that writes the data of level external; named as
      `threat_model.generator`.
    generation: how a model is asked to write.
    num_examples: examples in all.
    aligned_share: share of aligned ones among them.
    num_steps: optimizer steps.
    batch_size: examples of a step.
    learning_rate: of the first step, cosine over steps.
    final_learning_rate: of the last step.
    kl_weight: of a term that keeps predictions on normal data those of the
      attacked model: nats of divergence for each nat of loss.
    anchor_weight: of a term that keeps its last hidden states on normal data,
      by their mean squared distance.
    early_stopping: keeps the adapter that serves held-out aligned pairs best.
  """

  levels: tuple[str, ...] = ()
  public_aligned: str = 'demo_world:public'
  public_normal: str = 'demo_world:normal'
  external_model: str = 'demo_world:aligned'
  generation: GenerationConfig = GenerationConfig()
  num_examples: int = 1000
  aligned_share: float = 0.5
  num_steps: int = 500
  batch_size: int = 16
  learning_rate: float = 5e-5
  final_learning_rate: float = 1e-6
  kl_weight: float = 0.0
  anchor_weight: float = 0.0
  early_stopping: repair_settings.EarlyStoppingConfig = (
    repair_settings.EarlyStoppingConfig()
  )


@_Group
class DefenseConfig:
  """What the server does: an aggregation rule, and repair at the end.

  Attributes:
    aggregator: name of the rule.
    aggregator_kwargs: its arguments.
    lora_aggregation: what the rule acts on: factors (both, apart), ffa (only
      b is trained), rolora (b and a in turn), ffa_product and rolora_product
      (the same, with distances between the products) or product_svd (the
      products, cut to the rank).
    privacy_delta: delta of the epsilon that the last round's metrics give for
      all rounds, with dp_mean or dp_mean_adaptive; 0 gives none.
    probe: pairs of the server, for rules that ask for them.
    safe_lora: projection after every round.
    repair: tuning at the end.
  """

  aggregator: str = 'mean'
  aggregator_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  lora_aggregation: str = 'factors'
  privacy_delta: float = 0.0
  probe: defense_settings.ProbeConfig = defense_settings.ProbeConfig()
  safe_lora: defense_settings.SafeLoraConfig = defense_settings.SafeLoraConfig()
  repair: RepairConfig = RepairConfig()


@_Group
class PerformanceConfig:
  """What changes speed and memory, never results beyond rounding.

  Attributes:
    clients_per_chunk: clients trained at once; 0 trains the whole cohort, auto
      as many as the device's memory is thought to hold.
    mesh: sizes of the axes clients, fsdp, tp; their product is the number of
      devices used.
    remat: recompute blocks in the backward pass to save memory: true, false,
      or auto, where memory is thought not to suffice otherwise.
    attention: what attends while the model trains: xla, cudnn (NVIDIA GPUs),
      splash (TPUs), or auto, the device's kernel where it can do what the
      model asks and XLA's products elsewhere.
    loss_chunk: columns of the logits, tokens of the vocabulary, that a device
      makes at once while the model trains; 0 makes all of few logits at once,
      and of many some thousand columns.
    generation_batch_size: prompts answered at once.
  """

  clients_per_chunk: int | str = 0
  mesh: tuple[int, ...] = (1, 1, 1)
  remat: bool | str = False
  attention: str = 'auto'
  loss_chunk: int = 0
  generation_batch_size: int = 64


@_Group
class CheckpointConfig:
  """Which rounds are kept: 0 keeps all of them."""

  max_to_keep: int = 0


@_Group
class ExperimentConfig:
  """One arm at one seed: a federation, its defense, its measurement.

  Attributes:
    seed: of every draw of the run.
    label: the arm's words in the report; its name by default.
    given_adapter: PEFT directory of an adapter that is measured and repaired
      instead of federating one; `none` is the bare base, '' federates.
  """

  seed: int = 0
  label: str = ''
  given_adapter: str = ''
  model: ModelConfig = ModelConfig()
  lora: LoraConfig = LoraConfig()
  data: DataConfig = DataConfig()
  client: ClientConfig = ClientConfig()
  server: ServerConfig = ServerConfig()
  threat_model: ThreatModelConfig = ThreatModelConfig()
  defense: DefenseConfig = DefenseConfig()
  evaluation: evaluation_settings.EvaluationConfig = (
    evaluation_settings.EvaluationConfig()
  )
  performance: PerformanceConfig = PerformanceConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
