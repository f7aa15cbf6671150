"""Ray nodes for the tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.nodes import Nodes


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    made = Nodes(tmp_path)
    yield made
    made.close()
