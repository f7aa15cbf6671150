"""Data flows one way: a module imports only from the layers before its own."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "m3agiqa"

# Earlier layers first; a module may import from its own layer's package or any earlier layer.
LAYERS: list[set[str]] = [
    {"errors", "aspects", "apart"},
    {"conversation", "records", "images", "ratings", "phash"},
    {"settings"},
    {"config"},
    {"train_config", "distil_config"},
    {"finetune_config", "ablate_config"},
    {"corpus"},
    {"decoding"},
    {"conversation_files", "seen"},
    {"models"},
    {"adapters"},
    {"predictor"},
    {"engine"},
    {"finetuning"},
    {"tiny"},
    {"runs"},
    {"id_set", "lease"},
    {"resume"},
    {"replace"},
    {"passing"},
    {"suspects"},
    {"distil"},
    {"curation"},
    {"export"},
    {"evaluation"},
    {"evaluate", "split"},
    {"opinions"},
    {"scoring"},
    {"progress", "table", "query"},
    {"report"},
    {"driver_memory", "connection", "flow", "source"},
    {"resources"},
    {"actor"},
    {"prometheus"},
    {"pipeline", "plan", "curate"},
    {"tracking"},
    {"training_run"},
    {"ablation"},
    {"cross_evaluate"},
    {"ray_training"},
    {"train_predictor", "finetune"},
    {"arguments"},
    {"status"},
    {"cli_ablate", "cli_curate", "cli_distil", "cli_evaluate", "cli_plan", "cli_report", "cli_status", "cli_train"},
    {"cli"},
    {"reference"},
]
# What a newcomer's `m3agiqa config` must not wait for.
HEAVY = {"torch", "ray", "vllm", "transformers", "peft"}
LIGHT = {
    "errors",
    "aspects",
    "settings",
    "config",
    "train_config",
    "distil_config",
    "finetune_config",
    "ablate_config",
    "conversation",
    "conversation_files",
    "ratings",
    "records",
    "images",
    "corpus",
    "decoding",
    "models",
    "adapters",
    "distil",
    "arguments",
    "cli",
    "cli_distil",
    "cli_plan",
    "cli_curate",
    "curation",
    "export",
    "cli_report",
    "query",
    "report",
    "cli_ablate",
    "cli_status",
    "suspects",
    "cli_evaluate",
    "evaluate",
    "evaluation",
    "phash",
    "seen",
    "split",
    "table",
    "progress",
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def unit(path: Path) -> str:
    """The top-level unit of a file: `engine` for m3agiqa/engine/vllm.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "m3agiqa" else set()
    return found


def layer(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name in names)


@pytest.mark.parametrize(
    "path", [p for p in modules() if unit(p) != "__init__"], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_a_module_imports_only_from_earlier_layers(path: Path):
    own = unit(path)
    for name in imports(path):
        if name.startswith("m3agiqa."):
            other = name.split(".")[1]
            if other in {"__version__", own}:
                continue
            assert layer(other) < layer(own), f"{own} imports {other}, which is not an earlier layer"


def test_every_module_has_a_layer():
    assert {unit(p) for p in modules()} - {"__init__"} == set().union(*LAYERS)


def test_light_modules_do_not_load_heavy_packages():
    for path in modules():
        if unit(path) in LIGHT:
            loaded = {name.split(".")[0] for name in imports(path, top_level_only=True)}
            assert not loaded & HEAVY, f"{path.name} imports {loaded & HEAVY} when it is imported"


def test_only_scoring_and_training_runs_speak_ray():
    speakers = {unit(p) for p in modules() if any(n.split(".")[0] == "ray" for n in imports(p))}
    assert speakers == {
        "driver_memory",
        "connection",
        "prometheus",
        "flow",
        "resources",
        "source",
        "actor",
        "pipeline",
        "curate",
        "ray_training",
        "train_predictor",
        "finetune",
    }


def test_files_are_short():
    long = {p.name: n for p in modules() if (n := len(p.read_text().splitlines())) > 400}
    assert not long
