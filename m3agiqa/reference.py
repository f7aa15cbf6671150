"""Writes the references of the command line and of the configurations from the code: `python -m m3agiqa.reference`."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from m3agiqa.cli import KINDS, parser
from m3agiqa.settings import Config, Section

_WRITTEN = "<!-- Written by `make docs`; edit the help texts and descriptions in the code instead. -->"


def references() -> dict[str, str]:
    """File name in docs/ -> its content, as the code has it now."""
    return {"reference-cli.md": cli_reference(), "reference-config.md": config_reference()}


def cli_reference() -> str:
    """Every command with its arguments, as Markdown."""
    lines = [
        "# The command line",
        "",
        _WRITTEN,
        "",
        "Exit codes: 0; 2 for something that you can mend, said in one line; 1 for an error of the program; 130 after "
        "Ctrl-C. Every command takes `-v`, which shows what Ray and the engine say, and tracebacks.",
    ]
    for name, about, command in _commands(parser()):
        lines += ["", f"## m3agiqa {name}", "", f"{_sentence(about)}", "", "| argument | meaning |", "|---|---|"]
        for action in command._actions:  # argparse has no public way to list them
            if not {"-h", "-v"} & set(action.option_strings):
                lines.append(f"| {_cell(f'`{_argument(action)}`')} | {_cell(_meaning(action))} |")
    return "\n".join(lines) + "\n"


def config_reference() -> str:
    """Every key of every configuration with its default, as Markdown."""
    lines = [
        "# The configurations",
        "",
        _WRITTEN,
        "",
        "A YAML file (`--config`) has sections with keys; `--set section.key=value` changes single ones. "
        "`m3agiqa config` prints what is in force, and `m3agiqa config --docs` this list.",
    ]
    for kind, model in KINDS.items():
        lines += ["", f"## {kind}", "", _sentence(" ".join((model.__doc__ or "").split()))]
        for section in _sections(model):
            lines += section
    return "\n".join(lines) + "\n"


def _commands(top: argparse.ArgumentParser) -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, command in action.choices.items():
                yield name, helps.get(name, ""), command


def _argument(action: argparse.Action) -> str:
    """`--set KEY=VALUE ...` as it is typed."""
    name = action.option_strings[-1] if action.option_strings else ""
    if action.nargs == 0:
        return name
    if action.metavar is None and action.choices is not None:
        value = "|".join(map(str, action.choices))
    elif isinstance(action.metavar, tuple):
        value = " ".join(action.metavar)
    else:
        value = action.metavar or action.dest.upper()
    return f"{name} {value}{' ...' if action.nargs == '+' else ''}".strip()


def _meaning(action: argparse.Action) -> str:
    needed = " (must be given)" if action.required and action.option_strings else ""
    return (action.help or "") + needed


def _sections(model: type[Config]) -> Iterator[list[str]]:
    for name, field in model.model_fields.items():
        section = field.annotation
        assert isinstance(section, type)
        assert issubclass(section, Section)
        defaults = section().model_dump(mode="json")
        about = _sentence(" ".join((section.__doc__ or "").split()))
        lines = ["", f"### {name}", "", about, "", "| key | default | meaning |", "|---|---|---|"]
        for key, info in section.model_fields.items():
            default = yaml.safe_dump(defaults[key], default_flow_style=True).removesuffix("...\n").strip()
            lines.append(f"| `{key}` | {_cell(f'`{default}`')} | {_cell(info.description or '')} |")
        yield lines


def _sentence(text: str) -> str:
    """Begins with a capital and ends with a full stop."""
    text = text[:1].upper() + text[1:]
    return text if not text or text.endswith(".") else f"{text}."


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")


def main() -> None:
    """Writes the files into a folder, `docs` unless another is named."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs")
    for name, text in references().items():
        (folder / name).write_text(text, encoding="utf-8")
        print(folder / name)


if __name__ == "__main__":
    main()
