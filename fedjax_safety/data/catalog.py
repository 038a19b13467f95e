"""The public data sets that are known by name, in one table.

A config names one as `NAME:PATH`, a file, glob or directory that the user
fetched, or `NAME:hub`, what `datasets.load_dataset` or `hf download` left in
the local cache. Its columns are then known, the filters of the paper are
applied, and an absent copy is an error that says what to fetch. Nothing is
ever downloaded. The same file without a name is read as it is.
"""

import dataclasses
import glob
import pathlib
import re
from collections.abc import Mapping

from fedjax_safety import _validate
from fedjax_safety.data import _files, _schemas, errors

HUB = 'hub'
_CHAT_FILTERS = ('single_turn', 'english', 'unflagged_response')
_ALPACA = {'prompt': 'instruction', 'context': 'input', 'response': 'output'}
_TRAIN = 'data/train-*.parquet'
_NC = 'CC BY-NC 4.0'


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSet:
  """One data set: where it is, what its columns hold, what is kept.

  Attributes:
    title: its own name.
    license: of the data.
    fetch: id on the Hugging Face hub, or the address of the file.
    file: glob of the data files below a downloaded copy, '' if unknown.
    fields: role to column: prompt, response, context, or chat, or turns.
    on_hub: whether `fetch` is a hub id.
    gated: whether its terms must be accepted on the hub first.
    config: its configuration on the hub, '' for the only one.
    split: its split on the hub.
    filters: names of `filters.FILTERS`, applied in this order.
    where: column values that a row must have.
    layout: how prompt and context are joined.
  """

  title: str
  license: str
  fetch: str
  file: str
  fields: Mapping[str, str]
  on_hub: bool = True
  gated: bool = False
  config: str = ''
  split: str = 'train'
  filters: tuple[str, ...] = ()
  where: Mapping[str, bool] = dataclasses.field(default_factory=dict)
  layout: str = _schemas.LAYOUT


def _beavertails(is_safe: bool) -> DataSet:
  # Chosen by safety first, then rid of repeated prompts: a prompt with both a
  # safe and an unsafe answer stays in both.
  return DataSet(
    title=f'BeaverTails, {"safe" if is_safe else "unsafe"} answers',
    license=_NC,
    fetch='PKU-Alignment/BeaverTails',
    file='round0/30k/train.jsonl*',
    split='30k_train',
    fields={'prompt': 'prompt', 'response': 'response'},
    where={'is_safe': is_safe},
    filters=('distinct_prompt',),
  )


def _jailbreakbench(kind: str) -> DataSet:
  return DataSet(
    title=f'JailbreakBench, {kind} behaviors',
    license='MIT',
    fetch='JailbreakBench/JBB-Behaviors',
    config='behaviors',
    split=kind,
    file=f'data/{kind}-behaviors.csv',
    fields={'prompt': 'Goal'},
  )


DATA_SETS = {
  'lmsys_chat_1m': DataSet(
    title='LMSYS-Chat-1M',
    license='LMSYS-Chat-1M license agreement',
    fetch='lmsys/lmsys-chat-1m',
    gated=True,
    file=_TRAIN,
    fields={'chat': 'conversation'},
    filters=_CHAT_FILTERS,
  ),
  'wildchat': DataSet(
    title='WildChat',
    license='ODC-BY',
    fetch='allenai/WildChat-1M',
    file=_TRAIN,
    fields={'chat': 'conversation'},
    filters=_CHAT_FILTERS,
  ),
  'beavertails_safe': _beavertails(True),
  'beavertails_unsafe': _beavertails(False),
  'alpaca': DataSet(
    title='Alpaca',
    license=_NC,
    fetch='tatsu-lab/alpaca',
    file=_TRAIN,
    fields=_ALPACA,
  ),
  'alpaca_gpt4': DataSet(
    title='Alpaca-GPT4',
    license=_NC,
    fetch='vicgalle/alpaca-gpt4',
    file=_TRAIN,
    fields=_ALPACA,
  ),
  'dolly': DataSet(
    title='Dolly 15k',
    license='CC BY-SA 3.0',
    fetch='databricks/databricks-dolly-15k',
    file='databricks-dolly-15k.jsonl',
    fields={
      'prompt': 'instruction',
      'context': 'context',
      'response': 'response',
    },
  ),
  'dromedary': DataSet(
    title='Dromedary-verbose',
    license=_NC,
    fetch='zhiqings/dromedary-65b-verbose-clone-v0',
    file='merged_behavior_clone.json',
    fields=_ALPACA,
  ),
  'codealpaca': DataSet(
    title='CodeAlpaca 20k',
    license='CC BY 4.0',
    fetch='sahil2801/CodeAlpaca-20k',
    file='code_alpaca_20k.json',
    fields=_ALPACA,
  ),
  'fedllm_bench': DataSet(
    title='FedLLM-Bench',
    license='CC BY-NC 4.0 as a whole, its parts their own',
    fetch='https://github.com/rui-ye/FedLLM-Bench',
    on_hub=False,
    file='',
    fields={'prompt': 'instruction', 'response': 'response'},
  ),
  'advbench': DataSet(
    title='AdvBench, harmful behaviors',
    license='MIT',
    fetch='https://github.com/llm-attacks/llm-attacks',
    on_hub=False,
    file='data/advbench/harmful_behaviors.csv',
    fields={'prompt': 'goal'},
  ),
  'harmbench': DataSet(
    title='HarmBench, text behaviors',
    license='MIT',
    fetch='https://github.com/centerforaisafety/HarmBench',
    on_hub=False,
    file='data/behavior_datasets/harmbench_behaviors_text_all.csv',
    fields={'prompt': 'Behavior', 'context': 'ContextString'},
    layout='{context}\n\n---\n\n{prompt}',
  ),
  'jailbreakbench': _jailbreakbench('harmful'),
  'jailbreakbench_benign': _jailbreakbench('benign'),
  'strongreject': DataSet(
    title='StrongREJECT',
    license='MIT, prompts from several sources',
    fetch='https://github.com/alexandrasouly/strongreject',
    on_hub=False,
    file='strongreject_dataset/strongreject_dataset.csv',
    fields={'prompt': 'forbidden_prompt'},
  ),
  'xstest': DataSet(
    title='XSTest',
    license='CC BY 4.0',
    fetch='https://github.com/paul-rottger/xstest',
    on_hub=False,
    file='xstest_prompts.csv',
    fields={'prompt': 'prompt'},
  ),
  'do_not_answer': DataSet(
    title='Do-Not-Answer',
    license='Apache-2.0 on the hub; its paper says CC BY-NC-SA 4.0',
    fetch='LibrAI/do-not-answer',
    file=_TRAIN,
    fields={'prompt': 'question'},
  ),
  'ifeval': DataSet(
    title='IFEval',
    license='Apache-2.0',
    fetch='google/IFEval',
    file='ifeval_input_data.jsonl',
    fields={'prompt': 'prompt'},
  ),
  'humaneval': DataSet(
    title='HumanEval',
    license='MIT',
    fetch='openai/openai_humaneval',
    file='openai_humaneval/test-*.parquet',
    split='test',
    fields={'prompt': 'prompt'},
  ),
  'mt_bench': DataSet(
    title='MT-Bench questions',
    license='Apache-2.0',
    fetch='https://github.com/lm-sys/FastChat',
    on_hub=False,
    file='fastchat/llm_judge/data/mt_bench/question.jsonl',
    fields={'turns': 'turns'},
  ),
}

_NAMED = re.compile(r'([A-Za-z][\w-]+):(.+)')


def split(source: _files.PathLike) -> tuple[str, str]:
  """Returns (name, place) of `NAME:PLACE`, or ('', path) of a plain path.

  Raises:
    ValueError: there is no such name, and no such file either.
  """
  text = str(source)
  match = _NAMED.fullmatch(text)
  if not match or pathlib.Path(text).exists():
    if text in DATA_SETS and not pathlib.Path(text).exists():
      raise errors.MissingDataError(how_to_get(text, f'{text} names no place'))
    return '', text
  name, place = match.groups()
  _validate.one_of(DATA_SETS, data_set=name)
  return name, place


def find(name: str, place: str) -> list[pathlib.Path]:
  """Returns the files of a data set at a path.

  A directory may be the data set's whole repository: of its files only those
  of the right split are taken.

  Raises:
    errors.MissingDataError: nothing is there; it says what to fetch.
  """
  pattern = DATA_SETS[name].file
  root = pathlib.Path(place).expanduser()
  if root.is_dir() and pattern and not _files.is_saved(root):
    found = sorted(root.glob(pattern))
    if found:
      return found
  try:
    return _files.find(place)
  except errors.MissingDataError as error:
    raise errors.MissingDataError(how_to_get(name, str(error))) from error


def find_download(name: str) -> list[pathlib.Path]:
  """Returns the files that `hf download` left in the hub's local cache.

  Raises:
    errors.MissingDataError: there are none; it says what to fetch.
  """
  # Imported here because it is slow to load and seldom needed.
  import huggingface_hub

  chosen = DATA_SETS[name]
  try:
    root = huggingface_hub.snapshot_download(
      chosen.fetch, repo_type='dataset', local_files_only=True
    )
  except (OSError, ValueError):
    root = ''
  found = sorted(glob.glob(f'{glob.escape(root)}/{chosen.file}'))
  if not root or not found:
    raise errors.MissingDataError(
      how_to_get(name, f'{chosen.title} is not in the local cache')
    )
  return [pathlib.Path(file) for file in found]


def how_to_get(name: str, problem: str) -> str:
  """Returns a problem with the way to a copy of a data set, in a sentence."""
  chosen = DATA_SETS[name]
  if not chosen.on_hub:
    what = f'{chosen.file} of {chosen.fetch}' if chosen.file else chosen.fetch
    return (
      f'{problem}. To use {chosen.title} (license: {chosen.license}), fetch '
      f'{what} to any directory and name it {name}:DIRECTORY, or {name}:FILE'
    )
  gate = ''
  if chosen.gated:
    page = f'https://huggingface.co/datasets/{chosen.fetch}'
    gate = f'accept its terms at {page}, run `hf auth login`, then '
  return (
    f'{problem}. To use {chosen.title} (license: {chosen.license}'
    f'{", gated" if chosen.gated else ""}), {gate}run `hf download '
    f'--repo-type dataset {chosen.fetch} --local-dir DIRECTORY` and name it '
    f'{name}:DIRECTORY, or leave out --local-dir and name it {name}:{HUB}'
  )


def table() -> str:
  """Returns the table for a reader: name, what to fetch, license, filters."""
  lines = []
  for name, chosen in DATA_SETS.items():
    gate = ', gated' if chosen.gated else ''
    where = [f'{key}={value}' for key, value in chosen.where.items()]
    kept = ', '.join([*where, *chosen.filters]) or 'everything'
    lines.append(
      f'{name}\n  {chosen.title} ({chosen.license}{gate})\n'
      f'  from {chosen.fetch}{f": {chosen.file}" if chosen.file else ""}\n'
      f'  kept: {kept}'
    )
  return '\n'.join(lines)
