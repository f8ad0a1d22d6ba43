"""Tests of the command line: one line per error, exit codes, recipes as defaults, a help text for every option."""

import json
from pathlib import Path

import pytest
import torch
from transformers import ViTConfig, ViTModel

from hf_regvit import RegViTModel
from hf_regvit.app import cli
from hf_regvit.app.arguments import ConvertArguments
from hf_regvit.app.recipes import RecipeError, RecipeParser
from hf_regvit.pretraining.arguments import PretrainingArguments

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}


@pytest.fixture
def vit_folder(tmp_path):
    torch.manual_seed(0)
    ViTModel(ViTConfig(**SMALL)).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def test_usage_and_unknown_command(capsys) -> None:
    assert cli.main([]) == 2
    assert cli.main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(f"\n  {name} " in usage for name in cli.COMMANDS)
    assert cli.main(["convrt"]) == 2
    assert capsys.readouterr().err == "error: Unknown command 'convrt'. Did you mean 'convert'?\n"


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_help_of_every_command_renders(command, capsys) -> None:
    assert cli.main([command, "--help"]) == 0
    assert "--config RECIPE.yaml" in capsys.readouterr().out


def test_convert_writes_a_checkpoint_with_processor(vit_folder, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert cli.main(["convert", "--model", str(vit_folder), "--output_dir", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["class"] == "RegViTModel"
    assert result["registers"] == 0
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.json", "model.safetensors", "preprocessor_config.json", "configuration_regvit.py", "modeling_regvit.py"
    }  # fmt: skip
    source = ViTModel.from_pretrained(vit_folder).eval()
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            RegViTModel.from_pretrained(out)(pixels)[0], source(pixels)[0], atol=1e-5, rtol=1e-5
        )


def test_convert_does_not_overwrite(vit_folder, tmp_path, capsys) -> None:
    args = ["convert", "--model", str(vit_folder), "--output_dir", str(tmp_path / "out")]
    assert cli.main(args) == 0
    assert cli.main(args) == 1
    assert "already contains a checkpoint" in capsys.readouterr().err


def test_failures_are_one_line_unless_debugged(tmp_path, capsys) -> None:
    args = ["convert", "--model", str(tmp_path / "no.pth"), "--output_dir", str(tmp_path / "out")]
    assert cli.main(args) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "no.pth" in error
    assert len(error.splitlines()) == 1
    with pytest.raises(FileNotFoundError):
        cli.main([*args, "--debug"])


def test_misuse_is_2(capsys) -> None:
    assert cli.main(["convert", "--model", "x"]) == 2  # no output_dir
    assert cli.main(["convert", "--model", "x", "--output_dir", "y", "--num_head", "3"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_dry_run_shows_every_recipe_on_a_machine_without_its_gpu(recipe, tmp_path, capsys) -> None:
    command = "finetune" if "mode:" in recipe.read_text() else "pretrain"
    assert cli.main([command, "--config", str(recipe), "--output_dir", str(tmp_path / "run"), "--dry_run"]) == 0
    assert "output_dir" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_dry_run_converts_nothing(vit_folder, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert cli.main(["convert", "--model", str(vit_folder), "--output_dir", str(out), "--dry_run"]) == 0
    assert not out.exists()
    assert f"output_dir: {out}" in capsys.readouterr().out


def test_overrides_reach_convert() -> None:
    args = ["--model", "m", "--output_dir", "o", "--num_attention_heads", "6"]
    args += ["--interpolate_antialias", "False", "--image_size", "32", "48"]
    (parsed,) = RecipeParser(ConvertArguments).parse(args)
    assert parsed.overrides() == {"num_attention_heads": 6, "interpolate_antialias": False, "image_size": [32, 48]}
    (parsed,) = RecipeParser(ConvertArguments).parse(["--model", "m", "--output_dir", "o", "--image_size", "32"])
    assert parsed.overrides() == {"image_size": 32}


def test_recipe_values_are_defaults_and_flags_win(tmp_path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("output_dir: from_recipe\nlayer_norm_eps: 1e-4\nverify: false\nnum_attention_heads: 3\n")
    args = ["--config", str(recipe), "--model", "m", "--num_attention_heads", "6"]
    (parsed,) = RecipeParser(ConvertArguments).parse(args)
    assert parsed.output_dir == "from_recipe"
    assert parsed.layer_norm_eps == 1e-4  # YAML itself reads this as text
    assert parsed.verify is False
    assert parsed.num_attention_heads == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output_dir: a\nnum_attention_head: 3\n", r"'num_attention_head' in .*r\.yaml:2\. .*'num_attention_heads'"),
        ("layer_norm_eps: small\n", r"layer_norm_eps: 'small' in .*r\.yaml:1"),
        ("- a\n- b\n", "holds a list"),
        ("a: [\n", "is not valid YAML"),
        ("verify:\n", r"Invalid value verify: None in .*r\.yaml:1: the value is missing"),
        ("num_attention_heads: [3, 6]\n", r"num_attention_heads: \[3, 6\] in .*: expected a single value"),
        ("output_dir:\n  name: a\n", r"output_dir: \{'name': 'a'\} in .*: expected a single value"),
        ("output_dir: a\nverify: no\noutput_dir: b\n", r"'output_dir' appears twice in .*r\.yaml, in lines 1 and 3"),
        ("# gr\u00fc\u00df\noutput_dir: a\n", r"r\.yaml' is not UTF-8 text"),
    ],
)
def test_bad_recipes_name_file_and_line(tmp_path, text, message) -> None:
    (tmp_path / "r.yaml").write_text(text, encoding="latin-1")
    with pytest.raises(RecipeError, match=message):
        RecipeParser(ConvertArguments).parse(["--config", str(tmp_path / "r.yaml")])
    with pytest.raises(RecipeError, match="does not exist"):
        RecipeParser(ConvertArguments).parse(["--config", str(tmp_path / "none.yaml")])


def test_recipe_values_that_yaml_reads_as_something_else(tmp_path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "save_strategy: no\nsave_total_limit:\ndata: photos\nreport_to: [none]\nglobal_crop_scale: 0.4\n"
    )
    parser = RecipeParser(PretrainingArguments)
    parser._use_recipe(recipe)
    read = {name: parser.get_default(name) for name in ("save_strategy", "save_total_limit", "data", "report_to")}
    assert read == {"save_strategy": "no", "save_total_limit": None, "data": ["photos"], "report_to": ["none"]}
    # The option itself rejects one number instead of two, rather than failing with a TypeError.
    with pytest.raises(ValueError, match=r"global_crop_scale is \[0\.4\]; expected two numbers"):
        RecipeParser(PretrainingArguments).parse(["--config", str(recipe), "--output_dir", str(tmp_path)])


def test_help_begins_with_what_is_the_commands_own(capsys):
    assert cli.main(["finetune", "--help"]) == 0
    text = capsys.readouterr().out
    places = [text.index(f"\n  {option} ") for option in ("--task", "--learning_rate", "--adam_beta1")]
    assert places == sorted(places)
    assert text.index("\ntraining:") < places[1] < text.index("\nother transformers.TrainingArguments:") < places[2]
    assert "(default: None)" not in text
    assert "--learning-rate" not in text.replace("--head-learning-rate", "")  # only one spelling is shown


COMMANDS_THAT_WRITE = {
    "convert": [], "diagnose": ["--data", "digits"], "retrofit": ["--data", "digits"], "extract": ["--data", "digits"],
    "evaluate": ["--data", "digits"], "finetune": ["--data", "digits"], "pretrain": ["--data", "digits"],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS_THAT_WRITE)
def test_where_nothing_can_be_written_is_told_before_the_work(command, tmp_path, capsys, monkeypatch) -> None:
    """Once, a diagnosis read all images and a retrofit searched for minutes before they failed to write a result."""
    (tmp_path / "file").touch()
    args = [command, *(["--model", str(tmp_path / "no model")] if command != "pretrain" else [])]
    args += COMMANDS_THAT_WRITE[command]
    assert cli.main([*args, "--output_dir", str(tmp_path / "file" / "out")]) == 1
    assert f"'{tmp_path}/file' is a file, so '{tmp_path}/file/out' cannot be created" in capsys.readouterr().err
    monkeypatch.setattr("os.access", lambda place, mode: False)  # root can write anywhere
    assert cli.main([*args, "--output_dir", str(tmp_path / "out")]) == 1
    assert f"'{tmp_path}' is not writable" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_conversion_that_is_stopped_while_it_writes_leaves_no_checkpoint(vit_folder, tmp_path, capsys, monkeypatch):
    """Once, config.json was left without a processor: it loaded with wrong statistics and blocked the next try."""
    from transformers import BaseImageProcessor

    def stopped(self, folder):
        raise KeyboardInterrupt

    args = ["convert", "--model", str(vit_folder), "--output_dir", str(tmp_path / "out")]
    with monkeypatch.context() as patched:
        patched.setattr(BaseImageProcessor, "save_pretrained", stopped)
        assert cli.main(args) == 130
    assert "interrupted" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
    assert cli.main(args) == 0


def test_home_folders_in_recipes_and_behind_an_equals_sign(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "recipe.yaml").write_text("model_name_or_path: ~/vit\nimage_size: [32]\n")
    (parsed,) = RecipeParser(ConvertArguments).parse(["--config=~/recipe.yaml", "--output_dir=~/out"])
    assert (parsed.model_name_or_path, parsed.output_dir) == (f"{tmp_path}/vit", f"{tmp_path}/out")
    (parsed,) = RecipeParser(ConvertArguments).parse(["--model", "owner/~name", "--output_dir", "a=~/b"])
    assert (parsed.model_name_or_path, parsed.output_dir) == ("owner/~name", "a=~/b")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["diagnose", "--model", "./nope", "--data", "digits"], "'./nope' does not exist. Expected a folder"),
        (["diagnose", "--model", "a/b/c", "--data", "digits"], "'a/b/c' does not exist. Expected a folder"),
        (["finetune", "--model", "./nope", "--data", "digits", "--use_cpu"], "'./nope' is neither a file nor a"),
        (["pretrain", "--init_from", "./nope", "--data", "digits", "--use_cpu"], "'./nope' is neither a file nor a"),
        (["finetune", "--model", "x", "--data", "digits", "--use_cpu", "--eval_strategy", "steps"],
         "eval_strategy is 'steps' and save_strategy is 'epoch', but the best checkpoint can only be loaded if every "
         "evaluated model is saved. Set --save_strategy steps, or"),
    ],
)  # fmt: skip
def test_what_is_not_there_or_does_not_fit_is_told_in_our_words(args, words, tmp_path, capsys) -> None:
    """Once, the message was the Hub's rule for repository names, or named an option that was not given."""
    assert cli.main([*args, "--output_dir", str(tmp_path / "out")]) == 1
    assert words in capsys.readouterr().err
