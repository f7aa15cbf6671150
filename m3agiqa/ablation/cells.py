"""Trainings that are done, one file each: what makes a long comparison go on where it was stopped.

A file's name tells what it is and a digest of all that decides it, so that another configuration trains anew
what it changes and keeps the rest.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from m3agiqa.ablate_config import AblateConfig
from m3agiqa.ablation.data import Input
from m3agiqa.ablation.learn import Learnt
from m3agiqa.ablation.parts import Parts
from m3agiqa.ablation.variations import Variation
from m3agiqa.errors import UserError

_PLAIN = re.compile(r"[^A-Za-z0-9_.=+-]+")


class Cells:
    """The folder OUT/cells."""

    def __init__(self, out: Path) -> None:
        self._out, self._folder = out, out / "cells"

    def prepare(self) -> None:
        """Makes the folder.

        Raises:
            UserError: if OUT is a file, holds something else, or cannot be written.
        """
        if self._out.is_dir() and any(self._out.iterdir()) and not self._folder.is_dir():
            raise UserError(f"--out {self._out}", "is not empty and holds no comparison", "give a new folder")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {self._out}", f"cannot be used ({error})", "give a folder that you own") from None

    def take(self, name: str, decides: Mapping[str, Any], make: Callable[[], Learnt]) -> tuple[Learnt, bool]:
        """What is there already, else what `make` gives, which is written at once; and whether it was there.

        Args:
            name: for people. decides: all that the training depends on.
        """
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
        file = self._folder / f"{_PLAIN.sub('-', name)}-{digest}.json"
        if file.is_file():
            return cast(Learnt, json.loads(file.read_text(encoding="utf-8"))), True
        learnt = make()
        # A name that is not looked for, until it is whole.
        half = file.with_suffix(".new")
        half.write_text(json.dumps({"name": name, "decided_by": decides, **learnt}) + "\n", encoding="utf-8")
        half.replace(file)
        return learnt, False


def decided_by(
    config: AblateConfig, variation: Variation, seed: int, inputs: Mapping[str, Input], data: str, lm_head: str | None
) -> dict[str, Any]:
    """All that decides one training.

    Args:
        data: digest of who is in which part. lm_head: digest of the LM head, which matters for top-k logits alone.
    """
    shape = config.shape.model_dump(exclude={"pooling"})
    top_k = {"top_k": config.measure.top_k, "lm_head": lm_head} if variation.capture == "top_k" else {}
    return {
        "rounds": variation.rounds,
        "capture": variation.capture,
        "head": variation.head,
        "pooling": variation.pooling,
        "loss": None if variation.head == "ridge" else variation.loss,
        "seed": seed,
        "shape": {} if variation.head == "ridge" else shape,
        "optim": config.optim.model_dump(exclude={"seed"}),
        "bucket_batches": config.data.bucket_batches,
        "inputs": {name: one.source.fingerprint for name, one in inputs.items()},
        "data": data,
        **top_k,
    }


def data_digest(inputs: Mapping[str, Input], parts: Parts, ids: set[str] | None, scale: tuple[float, float]) -> str:
    """Of which conversations there are, in which part and with which label.

    Args:
        ids: those that count; None: all.
    """
    digest = hashlib.sha256(repr(scale).encode())
    for name, one in sorted(inputs.items()):
        known = sorted(zip(one.ids, one.labels.tolist(), one.conversations.tokens.tolist(), strict=True))
        rows = [(*row, parts.of[name][row[0]]) for row in known if ids is None or row[0] in ids]
        digest.update(json.dumps([name, rows]).encode())
    return digest.hexdigest()[:16]
