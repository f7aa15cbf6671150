"""What every configuration is made of: frozen, typed sections, every field documented. Light to import.

A configuration is read from YAML, changed by `key=value` overrides (`engine.kind=transformers`), and refused
with the nearest name where a key does not exist.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from m3agiqa.errors import UserError


class Section(BaseModel):
    """A named group of keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Config(Section):
    """A configuration: every field is a section."""

    docs: ClassVar[str] = "m3agiqa config --docs"
    """The command that explains its keys."""

    @model_validator(mode="before")
    @classmethod
    def _sections_are_mappings(cls, value: Any) -> Any:
        for name in cls.model_fields:
            if isinstance(value, dict) and name in value and value[name] is None:
                raise ValueError(f"section {name!r} is empty; remove it or give it keys")
        return value


ConfigT = TypeVar("ConfigT", bound=Config)


def load(kind: type[ConfigT], path: str | Path | None = None, overrides: Sequence[str] = ()) -> ConfigT:
    """Reads a YAML file and applies `key.key=value` overrides, whose values are YAML too.

    Raises:
        UserError: for a file that cannot be read, an unknown key (names the nearest), a bad value.
    """
    data = _read_yaml(Path(path)) if path is not None else {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--set {override}", "is not of the form key=value", "write e.g. engine.kind=transformers")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"--set {override}", "the value is not YAML", "quote it") from error
        _put(data, key.strip().split("."), value, override, kind)
    source = f"--config {path}" if path is not None else "the configuration"
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _explain(error, source, kind) from None


def dump_config(config: Config) -> str:
    """The effective configuration as YAML that `load` reads back to the same."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def describe_config(kind: type[Config]) -> str:
    """Every key with its default and its documentation, one per line, as commented YAML."""
    lines: list[str] = []
    for section, field in kind.model_fields.items():
        model = field.annotation
        assert isinstance(model, type)
        assert issubclass(model, Section)
        doc = " ".join((model.__doc__ or "").split())
        lines += [f"# {doc}", f"{section}:"]
        defaults = model().model_dump(mode="json")
        for key, info in model.model_fields.items():
            value = yaml.safe_dump(defaults[key], default_flow_style=True).removesuffix("...\n").strip()
            lines.append(f"  {key}: {value}  # {info.description}")
    return "\n".join(lines)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--config {path}", "does not exist", "see configs/ for examples") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}", f"cannot be read ({error})", "give a YAML file") from None
    except yaml.YAMLError as error:
        raise UserError(f"--config {path}", f"is not YAML: {error}", "mend the line it names") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"--config {path}", f"holds a {type(data).__name__}, not sections with keys", "see configs/")
    return data


def _put(data: dict[str, Any], keys: list[str], value: Any, override: str, kind: type[Config]) -> None:
    for key in keys[:-1]:
        inner = data.setdefault(key, {})
        if not isinstance(inner, dict):
            raise UserError(f"--set {override}", f"{key!r} is a value, not a section", f"see `{kind.docs}`")
        data = inner
    data[keys[-1]] = value


def _explain(error: ValidationError, source: str, kind: type[Config]) -> UserError:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        near = _nearest(first["loc"], kind)
        cure = f"did you mean {near}?" if near else f"`{kind.docs}` lists every key"
        return UserError(f"{source}: {where}", "there is no such key", cure)
    given = first.get("input")
    shown = "" if isinstance(given, Mapping) else f" = {given!r}"
    message = first["msg"].removeprefix("Value error, ")
    return UserError(f"{source}: {where}{shown}", message, f"`{kind.docs}` explains every key")


def _nearest(loc: tuple[int | str, ...], kind: type[Config]) -> str | None:
    """The known key most like an unknown one: in its own section first, then anywhere."""
    known = {f"{s}.{k}" for s, f in kind.model_fields.items() for k in _keys(f.annotation)}
    known |= set(kind.model_fields)
    wanted = ".".join(str(part) for part in loc)
    by_key = difflib.get_close_matches(str(loc[-1]), [k.split(".")[-1] for k in known], n=1, cutoff=0.6)
    match = difflib.get_close_matches(wanted, sorted(known), n=1, cutoff=0.75)
    if match:
        return match[0]
    return next((k for k in sorted(known) if by_key and k.split(".")[-1] == by_key[0]), None)


def _keys(annotation: Any) -> list[str]:
    return list(annotation.model_fields)
