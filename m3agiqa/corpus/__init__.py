"""Reads a corpus, whatever it is stored in, into rows of one schema. Knows neither pixels nor Ray."""

from m3agiqa.corpus.access import Access, Refused
from m3agiqa.corpus.open import access_of, open_corpus
from m3agiqa.corpus.rows import FIXED_FIELDS, IMAGE_COLUMNS, Corpus, Shard

__all__ = ["FIXED_FIELDS", "IMAGE_COLUMNS", "Access", "Corpus", "Refused", "Shard", "access_of", "open_corpus"]
