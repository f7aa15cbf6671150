"""Random models, made once."""

import pytest

from tests.finetuning.helpers import write_model


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """Sees every image as one square."""
    return write_model(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def tiled(tmp_path_factory):
    """Cuts larger images into tiles, and so has more tokens of them."""
    return write_model(tmp_path_factory.mktemp("tiled"), tiles=True)
