"""An access to files that kills the process which reads one of them, as a decoder with a bug would."""

import os
from dataclasses import dataclass

from m3agiqa.corpus import Access


@dataclass(frozen=True)
class Deadly(Access):
    """Ends the process that reads a file of the name `deadly`, wherever that is done."""

    deadly: str = ""

    def fetch(self, uri: str) -> bytes:
        if uri.endswith(f"/{self.deadly}"):
            os._exit(3)
        return super().fetch(uri)


def deadly(access: Access, name: str) -> Deadly:
    return Deadly(access.roots, access.config, name)
