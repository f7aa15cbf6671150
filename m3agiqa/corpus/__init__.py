"""Reads a corpus, whatever it is stored in, into rows of one schema. Knows neither pixels nor Ray."""

from m3agiqa.corpus.files import fetch
from m3agiqa.corpus.open import open_corpus
from m3agiqa.corpus.rows import FIXED_FIELDS, IMAGE_COLUMNS, Corpus, Shard

__all__ = ["FIXED_FIELDS", "IMAGE_COLUMNS", "Corpus", "Shard", "fetch", "open_corpus"]
