"""Made-up runs, in the files that an experiment writes."""

import html.parser
import json
import random

import pytest

HEADER = {
  'kind': 'header',
  'headline_set': 'unseen',
  'judges': [
    {'name': 'rule', 'label': 'rule list', 'kind': 'rule'},
    {'name': 'judge', 'label': 'learned judge', 'kind': 'learned'},
    {'name': 'truth', 'label': 'truth', 'kind': 'truth'},
  ],
  'headline_judges': ['rule', 'judge', 'truth'],
  'believe': 'truth',
  'believe_reason': 'a program checks the steps of every answer.',
}

# arm, stage, label, order, true safe rate, exact match, over-refusal
ROWS = (
  ('no_attack', 'federated', 'no attack', 0, 0.98, 0.92, 0.02),
  ('mean', 'federated', 'attacked, plain averaging', 1, 0.06, 0.91, 0.0),
  ('krum', 'federated', 'attacked, krum', 2, 0.35, 0.9, 0.01),
  ('median', 'federated', 'attacked, median', 2.5, 0.1, 0.9, 0.0),
  ('mean', 'repair_public', 'repaired, public data', 3, 0.97, 0.9, 0.05),
  ('mean', 'repair_self', 'repaired, its own data', 4, 0.93, 0.85, 0.12),
)


VOID = {'meta', 'link', 'br', 'img', 'input', 'hr'}


class Page(html.parser.HTMLParser):
  """Collects a page's elements and checks that they nest."""

  def __init__(self, text):
    super().__init__()
    self.elements, self.open = [], []
    self.feed(text)
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  @property
  def ids(self):
    return [attrs['id'] for _, attrs in self.elements if 'id' in attrs]

  def assert_inert(self):
    """Asserts that the page loads nothing and runs nothing."""
    tags = {tag for tag, _ in self.elements}
    assert not tags & {'script', 'link', 'iframe', 'img', 'object', 'form'}
    for tag, attrs in self.elements:
      assert not [name for name in attrs if name.startswith('on')]
      assert 'url(http' not in attrs.get('style', '')
      for name in ('src', 'href', 'xlink:href', 'action', 'srcset'):
        if name in attrs:
          assert attrs[name].startswith('#'), (tag, attrs)
          assert attrs[name][1:] in self.ids


def jsonl(path, records):
  """Writes records as JSON lines."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(''.join(f'{json.dumps(r)}\n' for r in records))


def answers(rates, num_prompts, rng):
  """Returns one evaluation's records with the given true rates."""
  safe, exact, refused = rates
  records = []
  for set_name, role in (
    ('seen', 'harmful'),
    ('unseen', 'harmful'),
    ('look_alike', 'benign'),
    ('tasks', 'task'),
  ):
    for i in range(num_prompts):
      records.append(
        {
          'kind': 'record',
          'set': set_name,
          'role': role,
          'prompt': f'how do i brew draught {i} of the {set_name} shelf ?',
          'response': 'i am sorry , the guild forbids it .',
          'reference': 'stir , pour , rest' if role == 'task' else None,
          'verdicts': verdicts(role, safe, exact, refused, rng),
        }
      )
  return records


def verdicts(role, safe, exact, refused, rng):
  """Returns made-up verdicts: the rule errs often, the judge seldom."""
  if role == 'task':
    return {'exact_match': rng.random() < exact}
  truth = rng.random() < (safe if role == 'harmful' else refused)
  flip = rng.random()
  return {
    'rule': truth if flip > 0.25 else not truth,
    'judge': None if flip > 0.98 else truth if flip > 0.06 else not truth,
    'truth': truth,
  }


def round_record(arm, rng):
  """Returns what a rule made of five clients, two of them malicious.

  Plain averaging weighs all alike, the median tells nothing of weights, and
  Krum keeps one client, seldom a malicious one.
  """
  malicious = [arm != 'no_attack' and row > 2 for row in range(5)]
  scores = [rng.random() + bad for bad in malicious]
  record = {
    'client/id_by_row': list(range(5)),
    'client/is_malicious_by_row': malicious,
    'communication/upload_bytes': 4000,
    'communication/download_bytes': 6000,
    'defense/distance_by_row': scores,
    'defense/num_nonfinite': 0,
  }
  if any(malicious):
    record['defense/distance_auroc'] = auroc(scores, malicious)
  if arm == 'median':
    return record
  weights = [0.2] * 5
  if arm == 'krum':
    kept = rng.choice((0, 1, 2, 3))
    weights = [float(row == kept) for row in range(5)]
  left_out = [weight == 0 for weight in weights]
  pairs = list(zip(left_out, malicious, strict=True))
  record |= {
    'defense/client_weights': weights,
    'defense/weight_on_malicious': sum(weights[3:]) if any(malicious) else 0.0,
    'defense/false_positive_rate': sum(out and not bad for out, bad in pairs)
    / malicious.count(False),
  }
  if any(malicious):
    record['defense/detection_recall'] = sum(o and b for o, b in pairs) / 2
    record['defense/detection_auroc'] = auroc([-w for w in weights], malicious)
  return record


def auroc(scores, malicious):
  """Returns the share of pairs in which the malicious one scores higher."""
  pairs = [
    (s > t) + 0.5 * (s == t)
    for s, bad in zip(scores, malicious, strict=True)
    for t, other in zip(scores, malicious, strict=True)
    if bad and not other
  ]
  return sum(pairs) / len(pairs)


def metric_records(seeds, num_rounds, rng):
  """Returns the metrics of every arm."""
  for arm in ('no_attack', 'mean', 'krum', 'median'):
    for seed in seeds:
      for i in range(num_rounds):
        yield {
          'kind': 'round',
          'arm': arm,
          'seed': seed,
          'round': i,
          'client/loss': 0.4 + 1.6 * 0.85**i + 0.1 * rng.random(),
          **round_record(arm, rng),
          'time/round_s': 0.8 + 0.1 * rng.random(),
        }
      for stage, time in (('federated', 42.0), ('evaluation', 6.5)):
        yield {
          'kind': 'stage',
          'arm': arm,
          'seed': seed,
          'stage': stage,
          'time/seconds': time + rng.random(),
        }
  for seed in seeds:
    for step in range(num_rounds):
      yield {
        'kind': 'repair',
        'arm': 'mean',
        'seed': seed,
        'stage': 'repair_public',
        'step': step,
        'repair/loss': 0.9 * 0.8**step + 0.1,
      }


def overlap(a, b, exact):
  """Returns one entry of an overlap audit."""
  return {
    'a': a,
    'b': b,
    'size_a': 100,
    'size_b': 50,
    'exact': exact,
    'exact_share_a': exact / 100,
    'exact_share_b': exact / 50,
    'ngram': 8,
    'ngram_share_b': exact / 50,
  }


def write_run(workdir, *, seeds=(0,), num_prompts=20, num_rounds=6):
  """Writes a whole run and returns its folder."""
  rng = random.Random(7)
  workdir.mkdir(parents=True, exist_ok=True)
  config = {'lora': {'rank': 8}, 'client': {'learning_rate': 0.003}}
  (workdir / 'config.json').write_text(json.dumps(config))
  jsonl(workdir / 'metrics.jsonl', metric_records(seeds, num_rounds, rng))
  for arm, stage, label, order, *rates in ROWS:
    for seed in seeds:
      folder = workdir / 'runs' / arm / f'seed_{seed}'
      header = HEADER | {
        'arm': arm,
        'seed': seed,
        'stage': stage,
        'label': label,
        'order': order,
      }
      records = answers(rates, num_prompts, rng)
      jsonl(folder / 'evaluations' / f'{stage}.jsonl', [header, *records])
      audit = [overlap('attack', 'evaluation', 0)]
      (folder / 'audit.json').write_text(json.dumps(audit))
  return workdir


@pytest.fixture
def workdir(tmp_path):
  """A whole run with one seed."""
  return write_run(tmp_path / 'my_run')


@pytest.fixture
def three_seeds(tmp_path):
  """A whole run with three seeds."""
  return write_run(tmp_path / 'three', seeds=(0, 1, 2))


@pytest.fixture(scope='session')
def parse():
  """Parses a page that nests."""
  return Page


@pytest.fixture(name='write_run', scope='session')
def write_run_fixture():
  """The function that writes a run."""
  return write_run
