"""Who may import whom (layers of the architecture), what goes to the Hub, and how long a function may be."""

import ast
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_imports

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "hf_regvit"
SOURCES = sorted(PACKAGE.glob("*.py"))
REMOTE_CODE = ("configuration_regvit", "modeling_regvit")
LONGEST_FUNCTION = 100

MODEL = {"configuration_regvit", "modeling_regvit"}  # layer 0
IMAGES = MODEL | {"images", "image_guard"}  # a picture is opened in one place, below everything that reads pictures
# layers 0 and 1
FOUNDATIONS = IMAGES | {
    "families",
    "features",
    "extraction",
    "augmentation",
    "data",
    "dense",
    "dense_transforms",
    "losses",
    "optimization",
}
JOBS = FOUNDATIONS | {
    "probes", "dense_probes", "outliers", "artifacts", "lost", "metrics", "conversion", "export", "evaluation",
    "retrofit",
}  # fmt: skip
# What draws or publishes takes finished results; the model only as a type.
RESULTS = MODEL | {
    "families",
    "features",
    "extraction",
    "probes",
    "outliers",
    "artifacts",
    "lost",
    "evaluation_report",
    "retrofit",
}
ANYTHING = None

ALLOWED: dict[str, set[str] | None] = {
    "configuration_regvit": set(),
    "modeling_regvit": {"configuration_regvit"},
    "image_guard": set(),
    "images": {"image_guard"},
    "families": set(),
    "features": IMAGES | {"families"},
    "extraction": IMAGES | {"families", "features"},
    "augmentation": {"images"},
    "data": {"images", "image_guard", "augmentation"},
    "dense": {"images", "image_guard"},
    "dense_transforms": {"dense", "augmentation"},
    "losses": set(),
    "optimization": set(),
    "data_check": FOUNDATIONS,
    "probes": FOUNDATIONS,
    "outliers": set(),
    "register_controls": FOUNDATIONS | {"probes"},
    # A diagnosis holds the tables of the token probes and of the register controls.
    "artifacts": FOUNDATIONS | {"probes", "outliers", "register_controls"},
    "checkpoint_comparison": FOUNDATIONS | {"artifacts"},
    "lost": FOUNDATIONS,
    "metrics": FOUNDATIONS | {"outliers", "lost"},  # their formulas as evaluate.Metric
    "conversion": FOUNDATIONS,
    "export": FOUNDATIONS,
    "intervals": set(),
    "object_discovery": FOUNDATIONS | {"lost", "intervals"},
    "classification_probes": set(),
    "evaluation_report": {"intervals", "object_discovery"},
    "feature_cache": FOUNDATIONS,
    "feature_tasks": FOUNDATIONS
    | {"probes", "metrics", "classification_probes", "evaluation_report", "feature_cache", "object_discovery"}
    | {"dense_probes"},
    "evaluation": FOUNDATIONS
    | {"metrics", "evaluation_report", "feature_cache", "feature_tasks", "object_discovery", "dense_probes", "dense"},
    "dense_probes": FOUNDATIONS | {"metrics"},
    "retrofit": FOUNDATIONS | {"artifacts", "outliers", "conversion"},
    "distillation": FOUNDATIONS,
    "upload": MODEL,
    "model_card": MODEL,
    "pushing": MODEL | {"upload", "model_card"},  # a push from a running training has its card from the first on
    "checkpoints": MODEL | {"pushing"},
    # Panels of a run are drawn while it runs; figures know the model and no part of the training.
    "callbacks": JOBS | {"distillation", "checkpoints", "figures"},
    "monitors": JOBS | {"callbacks", "distillation", "figures"},
    "alarms": {"callbacks", "distillation"},
    "run_folder": JOBS | {"callbacks", "checkpoints", "distillation", "figures"},
    "pretraining_arguments": {"configuration_regvit", "optimization"},
    "pretraining": JOBS
    | {
        "callbacks",
        "checkpoints",
        "distillation",
        "monitors",
        "alarms",
        "run_folder",
        "pretraining_arguments",
        "model_card",
    },
    "finetuning_arguments": set(),
    "finetuning_data": MODEL | {"data", "images", "image_guard", "finetuning_arguments"},
    "classification": JOBS | {"figures", "finetuning_arguments", "finetuning_data"},
    "finetuning_folder": MODEL | {"figures", "run_folder", "upload", "model_card"},
    "finetuning_dense": JOBS | {"figures", "finetuning_arguments", "finetuning_data", "intervals"},
    "finetuning_model": JOBS | {"finetuning_arguments", "finetuning_data", "run_folder"},
    "finetuning": JOBS
    | {"alarms", "callbacks", "checkpoints", "distillation", "run_folder", "classification", "model_card"}
    | {"finetuning_arguments", "finetuning_data", "finetuning_folder", "finetuning_model"},
    "figures": RESULTS,
    "report": RESULTS | {"figures"},
    "hub": RESULTS | {"upload", "model_card", "checkpoints", "figures", "evaluation_report"},
    "doctor": MODEL,
    "exploration": RESULTS | {"images", "figures"},
    "demo": ANYTHING,
    "arguments": ANYTHING,
    "cli": ANYTHING,
    "__main__": ANYTHING,
    "__init__": ANYTHING,
}
# On top of everything: nobody below may reach up to them.
ENTRIES = {"arguments", "cli", "__main__", "__init__", "demo"}


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def internal_imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "hf_regvit"):
            module = (node.module or "").removeprefix("hf_regvit").strip(".")
            found |= {module.split(".")[0]} if module else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.partition(".")[2] or "__init__"
                for alias in node.names
                if alias.name.split(".")[0] == "hf_regvit"
            }
    return found


def imports_at_the_top(path: Path) -> set[str]:
    """Absolute module names that importing the file loads at once."""
    found = set()
    for node in tree_of(path).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_module_has_a_place_in_the_layers():
    unknown = {path.stem for path in SOURCES} - set(ALLOWED)
    assert not unknown, f"Give {unknown} a layer in ALLOWED, or put the code into a module whose job it is."


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_imports_follow_the_layers(path):
    allowed = ALLOWED[path.stem]
    if allowed is not ANYTHING:
        assert internal_imports(path) - allowed == set()


def test_the_reader_of_imports_sees_every_form(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "from .data import a\nfrom . import losses\nimport hf_regvit.probes\nimport hf_regvit\n"
        "from hf_regvit.cli import main\ndef f():\n    from hf_regvit import figures\n    from .features import x\n"
    )
    assert internal_imports(path) == {"data", "losses", "probes", "__init__", "cli", "figures", "features"}


def test_nothing_imports_what_is_on_top():
    for path in SOURCES:
        if path.stem not in ENTRIES:
            assert not internal_imports(path) & ENTRIES, path.name


def test_nothing_in_the_package_imports_scripts_examples_or_tests():
    for path in SOURCES:
        roots = {name.split(".")[0] for name in imports_at_the_top(path)}
        assert not roots & {"scripts", "examples", "tests", "helpers", "oracles"}, path.name


def test_importing_the_package_loads_no_heavy_library():
    """What `import hf_regvit` reaches at once: itself, its relative imports at the top, and nothing slow."""
    heavy = {
        "datasets", "matplotlib", "sklearn", "skimage", "cv2", "timm", "gradio", "onnx", "evaluate", "accelerate",
        "torchvision", "PIL", "numpy", "scipy", "pandas",
    }  # fmt: skip
    reached, queue = set(), ["__init__"]
    while queue:
        name = queue.pop()
        if name in reached:
            continue
        reached.add(name)
        for node in tree_of(PACKAGE / f"{name}.py").body:
            if isinstance(node, ast.ImportFrom) and node.level:
                queue.append(node.module)
    assert reached == {"__init__", *REMOTE_CODE}
    for name in reached:
        names = imports_at_the_top(PACKAGE / f"{name}.py")
        assert not {full.split(".")[0] for full in names} & heavy, name
        assert not {full for full in names if "Trainer" in full or "training_args" in full}, name


def test_optional_libraries_are_imported_where_they_are_used():
    optional = {"datasets", "matplotlib", "sklearn", "skimage", "cv2", "timm", "gradio", "onnx", "trackio", "peft"}
    for path in SOURCES:
        roots = {name.split(".")[0] for name in imports_at_the_top(path)}
        assert not roots & optional, f"{path.name}: import {roots & optional} inside the function that needs it"


@pytest.mark.parametrize(("name", "relative"), [(REMOTE_CODE[0], []), (REMOTE_CODE[1], [REMOTE_CODE[0]])])
def test_remote_code_runs_without_the_package(name, relative):
    """Read with the Hub loader's own functions: they search the text, docstrings included."""
    path = PACKAGE / f"{name}.py"
    assert get_relative_imports(path) == relative
    packages = {module for module in get_imports(path) if module not in sys.stdlib_module_names}
    assert packages <= {"torch", "transformers", "huggingface_hub", "safetensors"}
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert (node.level, node.module, [alias.name for alias in node.names]) == (
                1, "configuration_regvit", ["RegViTConfig"]
            )  # fmt: skip
        elif isinstance(node, ast.ImportFrom | ast.Import):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not [module for module in modules if module.split(".")[0] == "hf_regvit"]


def test_no_module_is_a_drawer():
    names = {path.stem for path in PACKAGE.rglob("*.py")} | {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert not names & {"utils", "util", "common", "helpers", "misc", "tools", "base"}


@pytest.mark.parametrize(
    "path", [*SOURCES, *sorted((ROOT / "scripts").rglob("*.py")), *sorted((ROOT / "examples").rglob("*.py"))],
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)  # fmt: skip
def test_no_function_is_longer_than_a_page(path):
    long = {
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION
    }
    assert not long
