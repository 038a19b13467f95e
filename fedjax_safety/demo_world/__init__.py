"""The embedded default: an inert world, its models, and how to rebuild them."""

import pathlib

WEIGHTS = pathlib.Path(__file__).parent / 'weights'
