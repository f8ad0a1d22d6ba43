"""Values of recipes that YAML reads as something else are refused with their line, or mean what the text says."""

import re

import pytest

from hf_regvit.app.recipes import RecipeError, RecipeParser
from hf_regvit.finetuning.arguments import FinetuningArguments
from hf_regvit.pretraining.arguments import PretrainingArguments

pytestmark = pytest.mark.attacks

NUMBERS = (
    "12:30:45", "12:30.5", "1_000", "010", "0o10", "0x10", "0b1", ".nan", "nan", "NaN", ".inf", "-.inf", "inf",
    "1e999", "1,5", "2024-01-01", "true", "yes", "'1 0'", "[1, 2]", "[[1]]", "{a: 1}", "!!set {1}", "1e", "--1",
    "\uff11\uff12", "5%", "1 # 2\n  3", "!!binary aGk=", "!!timestamp 2024-01-01", "*x",
)  # fmt: skip
TEXTS = (
    "-1", "yes", "no", "on", "off", "True", ".nan", ".inf", "010", "0x10", "1_000", "12:30:45", "[[a]]", "[null]",
    "[on]", "{a: 1}", "null", "~", "!!binary aGk=", "!!set {a}", "1.0e+5", "+1",
)  # fmt: skip
BOOLS = ("2", "ja", "0.0", "yess", "[true]", "1:0", "'tru e'", "-1", ".nan", "null")
PROBABILITIES = (
    "mask_probability", "jitter_probability", "grayscale_probability", "solarize_probability", "flip_probability",
    "teacher_momentum", "teacher_momentum_end", "center_momentum", "drop_path_rate",
)  # fmt: skip


def refused(tmp_path, line, arguments=PretrainingArguments):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"# a comment\nseed: 1\n{line}\n", encoding="utf-8")
    with pytest.raises(RecipeError) as error:
        RecipeParser(arguments).values(["--config", str(recipe)])
    return str(error.value)


@pytest.mark.parametrize("value", NUMBERS)
@pytest.mark.parametrize("option", ["num_hidden_layers", "max_steps", "learning_rate", "mask_probability"])
def test_values_that_are_no_number(tmp_path, option, value):
    message = refused(tmp_path, f"{option}: {value}")
    assert "r.yaml:3" in message or "not valid YAML" in message, message


@pytest.mark.parametrize("value", TEXTS)
@pytest.mark.parametrize("option", ["data", "preset"])
def test_values_that_are_no_text(tmp_path, option, value):
    assert "r.yaml:3" in refused(tmp_path, f"{option}: {value}")


@pytest.mark.parametrize("value", BOOLS)
def test_values_that_are_neither_true_nor_false(tmp_path, value):
    assert "r.yaml:3" in refused(tmp_path, f"streaming: {value}")


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("data: '-1'", "data", ["-1"]), ("output_dir: 'on'", "output_dir", "on"), ("output_dir: 2024-01-01",
         "output_dir", "2024-01-01"), ("output_dir: 1.50", "output_dir", "1.50"), ("save_strategy: no",
         "save_strategy", "no"), ("streaming: on", "streaming", True), ("streaming: Off", "streaming", False),
        ("learning_rate: 1e-4", "learning_rate", 1e-4), ("learning_rate: '1e-4'", "learning_rate", 1e-4),
        ("learning_rate: 5", "learning_rate", 5.0), ("hidden_size: null", "hidden_size", None),
        ("output_dir: |\n  runs/a\n", "output_dir", "runs/a"), ("save_total_limit: ~", "save_total_limit", None),
    ],
)  # fmt: skip
def test_values_that_mean_their_text(tmp_path, line, name, value):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(line)
    read = RecipeParser(PretrainingArguments).values(["--config", str(recipe)])
    assert read == {name: value}
    assert type(read[name]) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "'seed' appears twice in .*, in lines 1 and 2"),
        ("data: a\ndataset_name: b\n", "'dataset_name' appears twice in .*, in lines 1 and 2"),
        ("<<: {seed: 1}\n", "Unknown key '<<'"), ("? [a, b]\n: c\n", "Unknown key|not valid YAML"),
        ("on: 1\n", "Unknown key 'on'"), ("12: 3\n", "Unknown key '12'"), ("~: 3\n", "Unknown key '~'"),
        ("false\n", "holds a bool"), ("0\n", "holds a int"), ("''\n", "holds a str"), ("---\na: 1\n---\nb: 1\n",
         "not valid YAML"), ("seed: !!python/object:os.system ls\n", "not valid YAML"),
        ("seed: 1: 2\n", "not valid YAML"),
    ],
)  # fmt: skip
def test_recipes_that_are_no_list_of_options(tmp_path, text, message):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    with pytest.raises(RecipeError, match=message):
        RecipeParser(FinetuningArguments).values(["--config", str(recipe)])


@pytest.mark.parametrize("name", PROBABILITIES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 1.1])
def test_probabilities_of_callers(tmp_path, name, value):
    with pytest.raises(ValueError, match=re.escape(f"{name} is {value}")):
        PretrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{name: value})
    for option in ("learning_rate", "weight_decay", "layer_decay"):
        with pytest.raises(ValueError, match=f"{option} is nan"):
            FinetuningArguments(output_dir=str(tmp_path), use_cpu=True, **{option: float("nan")})


@pytest.mark.parametrize("value", ["nan", "inf", "1_000", "0x10", "\uff11"])
def test_the_command_line_refuses_the_same(value, capsys):
    with pytest.raises(SystemExit):
        RecipeParser(PretrainingArguments).values(["--learning_rate", value])
    assert "is not a finite number" in capsys.readouterr().err
