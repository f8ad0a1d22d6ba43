"""Tests of the command line: one line per error, exit codes, recipes as defaults, a help text for every option."""

import io
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import transformers
from transformers import ViTModel

import hf_regvit_cli
from builders import tiny_source
from hf_regvit import RegViTModel
from hf_regvit.app import cli
from hf_regvit.app.arguments import ConvertArguments
from hf_regvit.app.recipes import RecipeError, RecipeParser, options_of_command
from hf_regvit.models.processing import default_image_processor
from hf_regvit.pretraining.arguments import PretrainingArguments

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}


def test_usage_and_unknown_command(capsys) -> None:
    assert cli.main([]) == 2
    assert cli.main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(f"\n  {name} " in usage for name in cli.COMMANDS)
    assert cli.main(["convrt"]) == 2
    assert capsys.readouterr().err == "error: Unknown command 'convrt'. Did you mean 'convert'?\n"


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_help_shows_the_daily_options_and_help_all_shows_all(command, capsys) -> None:
    options = hf_regvit_cli.parser_of(command).options
    assert cli.main([command, "--help"]) == 0
    daily = capsys.readouterr().out
    assert "--config RECIPE.yaml" in daily
    assert daily.endswith(f"\nexample:\n  {hf_regvit_cli.COMMANDS[command].example}\n")
    assert cli.main([command, "--help_all"]) == 0
    everything = capsys.readouterr().out
    assert "(default: None)" not in everything
    shown = {name for name, option in options.items() if f"\n  --{option['flags'][0]} " in daily} - {"debug"}
    assert len(shown) <= 25
    assert {name for name, option in options.items() if option["required"]} <= shown
    missing = {name for name, option in options.items() if f"\n  --{option['flags'][0]} " not in everything}
    assert missing <= {"debug"}  # an option of Trainer, which recipes can set; --debug shows the traceback of an error
    places = [everything.index(f"\n  --{options[name]['flags'][0]} ") for name in shown]
    assert everything.index("\nevery command:") > max(places)


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_the_options_are_those_of_the_argument_classes(command) -> None:
    """The file of options is reviewed, so no option is added or renamed by accident. Those of Trainer may vary."""
    table = json.loads(hf_regvit_cli.OPTIONS.read_text())
    same_version = table["transformers"] == transformers.__version__
    stored, found = (
        {option["name"]: option for option in options if same_version or not option["inherited"]}
        for options in (table["commands"][command], options_of_command(command))
    )
    assert stored == found, "run `python scripts/dev/write_options.py` and review the difference"


def test_examples_of_the_help_are_valid(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    for command in cli.COMMANDS.values():
        assert cli.main([*command.example.split()[1:], "--dry_run"]) == 0, capsys.readouterr().err


def test_names_of_dinov2_lead_to_options_of_pretraining() -> None:
    names = tomllib.loads((hf_regvit_cli.PACKAGE / "app" / "commands.toml").read_text())["dinov2"]
    options = hf_regvit_cli.parser_of("pretrain").names
    assert set(names.values()) <= set(options)
    assert not set(names) & set(options)


LIGHT = {
    "nothing": ([], 2), "help": (["--help"], 0), "version": (["--version"], 0), "mistyped command": (["pretrian"], 2),
    "help of a command": (["pretrain", "--help"], 0), "all options": (["evaluate", "--help_all"], 0),
    "mistyped option": (["finetune", "--lerning_rate", "1"], 2), "missing option": (["convert", "--model", "x"], 2),
    "wrong type": (["evaluate", "--model", "x", "--data", "y", "--batch_size", "many"], 2),
    "dry run": (["pretrain", "--config", "examples/photos_cpu.yaml", "--output_dir", "x", "--dry_run"], 0),
    "completion": (["completion", "zsh"], 0), "completion of another shell": (["completion", "tcsh"], 2),
    "mistyped key": (["pretrain", "--config", "tests/golden_recipes/photos_cpu.txt", "--steps", "x"], 2),
}  # fmt: skip


@pytest.mark.parametrize(("args", "status"), LIGHT.values(), ids=LIGHT)
def test_what_needs_no_model_loads_no_torch_and_takes_no_time(args, status, tmp_path) -> None:
    """Once, `--help` took 6 seconds of processor time. It takes less than 0.1; machines that run tests are noisy."""
    code = (
        "import atexit, sys\n"
        "print_loaded = lambda: print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])\n"
        "atexit.register(print_loaded)\n"
    )
    (tmp_path / "sitecustomize.py").write_text(code)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    for start in (["-c", "from hf_regvit_cli import main; raise SystemExit(main())"], ["-m", "hf_regvit"]):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, *start, *args], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert (done.returncode, done.stdout.splitlines()[-1]) == (status, "[]"), done.stderr
        assert len(done.stderr.splitlines()) == (1 if status and args else 0)
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["pretrain", "--local_crops_number", "8"],
         "The option 'local_crops_number' of DINOv2 is called '--num_local_crops' here."),
        (["pretrain", "--crops.global_crops_size=98"], "is called '--global_crop_size' here."),
        (["pretrain", "--layerwise-decay", "1"], "is called '--layer_decay' here."),
        (["finetune", "--learning_rat", "1"], "option '--learning_rat'. Did you mean '--learning_rate'?"),
        (["finetune", "--resume", "last"], "option '--resume'. Did you mean '--resume_from_checkpoint'?"),
        (["finetune", "--batchsize", "8"], "'batch_size' of DINOv2 is called '--per_device_train_batch_size' here."),
        (["finetune", "--zzz", "1"], "option '--zzz'. Run `regvit finetune --help_all` to list the options."),
        (["diagnose", "--teacher_temp", "1"], "option '--teacher_temp'. Run"),  # no option of this command
        (["extract", "--model", "a", "b"], "Unexpected argument 'b'. Quote values that contain spaces."),
        (["extract", "--model", "a"], "The following options are required: --data, --output_dir"),
        (["extract", "--layer", "last"], "--layer: 'last' is not a whole number"),
        (["extract", "--patches", "maybe"], "--patches: 'maybe' is neither true nor false"),
        (["pretrain", "--save_strategy", "never"], "--save_strategy: invalid choice: 'never' (choose from"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_one_line_with_the_right_one(args, message, capsys) -> None:
    assert cli.main(args) == 2
    error = capsys.readouterr().err
    assert message in error
    assert (error.startswith("error: "), len(error.splitlines())) == (True, 1)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("pretrian", "pretrain"), ("eval", "evaluate"), ("extract-features", "extract"), ("completions", "completion")],
)
def test_a_similar_command_or_the_only_one_that_begins_alike_is_suggested(typed, meant, capsys) -> None:
    assert cli.main([typed]) == 2
    assert capsys.readouterr().err == f"error: Unknown command '{typed}'. Did you mean '{meant}'?\n"


def test_a_command_without_a_similar_name_is_not_guessed(capsys) -> None:
    assert cli.main(["p"]) == 2  # pretrain or publish
    assert "Choose from" in capsys.readouterr().err
    assert cli.main(["xyz"]) == 2
    assert "Unknown command 'xyz'. Choose from data-check, pretrain" in capsys.readouterr().err


def test_options_of_another_transformers_are_those_that_are_installed(monkeypatch, tmp_path, capsys) -> None:
    table = json.loads(hf_regvit_cli.OPTIONS.read_text())
    table["commands"]["pretrain"] = [one for one in table["commands"]["pretrain"] if one["name"] != "optim"]
    (tmp_path / "options.json").write_text(json.dumps(table))
    monkeypatch.setattr(hf_regvit_cli, "OPTIONS", tmp_path / "options.json")
    assert "optim" not in hf_regvit_cli.parser_of("pretrain").names
    assert cli.main(["pretrain", "--optim", "adamw_torch", "--dry_run"]) == 0
    assert "optim: adamw_torch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("no image"), "error: no image\n"),
        (NotImplementedError(), "error: NotImplementedError. Run the command with --debug to see where.\n"),
        (KeyError("x"), "error: KeyError: 'x'. Run the command with --debug to see where.\n"),
        (AssertionError(), "error: AssertionError. Run the command with --debug to see where.\n"),
        (ValueError("output_dir is 'a' and image_column=b; set self_test."),
         "error: --output_dir is 'a' and image_column=b; set --self_test.\n"),
        (ValueError("no file 'x/output_dir/y', --output_dir, output_dir_x or output_dir()"),
         "error: no file 'x/output_dir/y', --output_dir, output_dir_x or output_dir()\n"),
    ],
)  # fmt: skip
def test_an_error_has_a_text_and_names_options(error, text, monkeypatch, capsys) -> None:
    monkeypatch.setitem(cli.RUNS, "doctor", Mock(side_effect=error))
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == text


def test_notes_of_an_error_are_printed(monkeypatch, capsys) -> None:
    error = RuntimeError("out of memory")
    error.add_note("Try a smaller batch: output_dir is kept.")
    monkeypatch.setitem(cli.RUNS, "doctor", Mock(side_effect=error))
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == "error: out of memory\nTry a smaller batch: --output_dir is kept.\n"


def test_ctrl_c_is_one_line_and_130(monkeypatch, capsys) -> None:
    monkeypatch.setitem(cli.RUNS, "doctor", Mock(side_effect=KeyboardInterrupt()))
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.5, 1.5, 3.0])
def test_ctrl_c_during_the_imports_is_one_line(seconds, tmp_path) -> None:
    args = ["pretrain", "--data", str(tmp_path / "nothing"), "--output_dir", str(tmp_path / "out")]
    code = "import sys\nfrom hf_regvit_cli import main\nprint(flush=True)\nsys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "error: interrupted\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_an_error_begins_on_a_line_of_its_own_after_a_bar(monkeypatch) -> None:
    def run(arguments):
        sys.stderr.write("\r 10%|#   | 1/10")
        sys.stderr.write("\r 20%|##  | 2/10")
        raise ValueError("no image")

    monkeypatch.setitem(cli.RUNS, "doctor", run)
    for stream, text in (
        (Terminal(), "\r 10%|#   | 1/10\r 20%|##  | 2/10\nerror: no image\n"),
        (io.StringIO(), " 10%|#   | 1/10\n 20%|##  | 2/10\nerror: no image\n"),
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        assert cli.main(["doctor"]) == 1
        assert stream.getvalue() == text
        assert sys.stderr is stream


def test_bars_are_plain_lines_without_a_terminal(monkeypatch) -> None:
    from tqdm import tqdm

    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", hf_regvit_cli._Lines(stream))
    for _ in tqdm(range(3), desc="images", mininterval=0, leave=True):
        pass
    with tqdm(total=2, desc="outer", mininterval=0) as outer, tqdm(total=2, desc="inner", mininterval=0) as inner:
        inner.update(2)
        outer.update(2)
    print("done", file=sys.stderr)
    lines = stream.getvalue().splitlines()
    assert not re.search(r"[\r\x1b]|\n\n", stream.getvalue())
    assert [line.split(":")[0] for line in lines if "100%" in line] == ["images", "outer", "inner"] or len(lines) > 6
    assert lines[-1] == "done"


def test_a_message_after_a_finished_bar_gets_no_empty_line() -> None:
    stream = Terminal()
    lines = hf_regvit_cli._Lines(stream)
    for text in ("\r100%|####| 2/2", "\n", "done\n", "\r 50%|## | 1/2", "\r          \r", "cleared\n", "end\n"):
        lines.write(text)
    assert stream.getvalue() == "\r100%|####| 2/2\ndone\n\r 50%|## | 1/2\r          \rcleared\nend\n"


@pytest.mark.parametrize(
    ("values", "offline"),
    [
        ({"model": "word"}, True), ({"model": ["owner/name"]}, True), ({"data": "owner/name:config"}, True),
        ({"init_from": "word"}, True), ({"model": "./word", "data": "/a/b"}, False), ({"output_dir": "word"}, False),
        ({"data": "tests"}, False),  # exists
        ({"data": ["digits", "photos"]}, False), ({}, False),
    ],
)  # fmt: skip
def test_a_hub_that_does_not_answer_is_not_waited_for(values, offline, monkeypatch, caplog) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delitem(sys.modules, "huggingface_hub")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with caplog.at_level(logging.INFO):
        hf_regvit_cli._go_offline_if_unreachable(values)
    assert (os.environ.get("HF_HUB_OFFLINE") == "1") == offline
    assert ("127.0.0.1 does not answer" in caplog.text) == offline


def test_convert_writes_a_checkpoint_with_processor(tmp_path, capsys) -> None:
    vit_folder = tmp_path / "vit"
    tiny_source("ViTModel", **SMALL).save_pretrained(vit_folder)
    out = tmp_path / "out"
    args = ["convert", "--model", str(vit_folder), "--output_dir", str(out), "--json"]
    assert cli.main(args) == 1
    assert "No image processor is known for" in capsys.readouterr().err
    default_image_processor(32).save_pretrained(tmp_path / "processor")
    assert cli.main([*args, "--processor", str(tmp_path / "processor")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["class"] == "RegViTModel"
    assert result["registers"] == 0
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.json", "manifest.json", "model.safetensors", "preprocessor_config.json", "configuration_regvit.py",
        "modeling_regvit.py",
    }  # fmt: skip
    source = ViTModel.from_pretrained(vit_folder).eval()
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            RegViTModel.from_pretrained(out)(pixels)[0], source(pixels)[0], atol=1e-5, rtol=1e-5
        )


def test_convert_does_not_overwrite(tmp_path, capsys) -> None:
    vit_folder = tmp_path / "vit"
    tiny_source("ViTModel", **SMALL).save_pretrained(vit_folder)
    default_image_processor(32).save_pretrained(vit_folder)
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


COMMAND_RECIPES = sorted(path for path in (ROOT / "examples").glob("*.yaml") if "image_text" not in path.stem)


@pytest.mark.parametrize("recipe", COMMAND_RECIPES, ids=lambda path: path.stem)  # images with texts have a script
def test_dry_run_shows_every_recipe_on_a_machine_without_its_gpu(recipe, tmp_path, capsys) -> None:
    command = "pretrain" if "global_crop_size:" in recipe.read_text() else "finetune"
    assert cli.main([command, "--config", str(recipe), "--output_dir", str(tmp_path / "run"), "--dry_run"]) == 0
    assert "output_dir" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_dry_run_converts_nothing(tmp_path, capsys) -> None:
    vit_folder = tmp_path / "vit"
    tiny_source("ViTModel", **SMALL).save_pretrained(vit_folder)
    out = tmp_path / "out"
    assert cli.main(["convert", "--model", str(vit_folder), "--output_dir", str(out), "--dry_run"]) == 0
    assert not out.exists()
    assert f"output_dir: {out}" in capsys.readouterr().out


def test_overrides_reach_convert() -> None:
    args = ["--model", "m", "--output_dir", "o", "--num_attention_heads", "6"]
    args += ["--interpolate_antialias", "False", "--image_size", "32", "48"]
    (parsed,) = RecipeParser(ConvertArguments).parse(args)
    assert parsed.given() == {
        "verify": True, "num_attention_heads": 6, "interpolate_antialias": False, "image_size": [32, 48],
    }  # fmt: skip
    (parsed,) = RecipeParser(ConvertArguments).parse(["--model", "m", "--output_dir", "o", "--image_size", "32"])
    assert parsed.given() == {"verify": True, "image_size": 32}


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
    values = RecipeParser(PretrainingArguments).values(["--config", str(recipe)])
    read = {name: values[name] for name in ("save_strategy", "save_total_limit", "data", "report_to")}
    assert read == {"save_strategy": "no", "save_total_limit": None, "data": ["photos"], "report_to": ["none"]}
    # The option itself rejects one number instead of two, rather than failing with a TypeError.
    with pytest.raises(ValueError, match=r"global_crop_scale is \[0\.4\]; expected two numbers"):
        RecipeParser(PretrainingArguments).parse(["--config", str(recipe), "--output_dir", str(tmp_path)])


def test_help_begins_with_the_daily_options_and_ends_with_those_of_trainer(capsys):
    assert cli.main(["finetune", "--help_all"]) == 0
    text = capsys.readouterr().out
    order = ["\n  --task ", "\ntraining:", "\n  --learning_rate ", "\nfurther options:", "\n  --lora_r ",
             "\ntransformers.TrainingArguments:", "\n  --adam_beta1 "]  # fmt: skip
    places = [text.index(words) for words in order]
    assert places == sorted(places)
    assert "--learning-rate" not in text  # only one spelling is shown


def test_aliases_are_options_and_keys_of_recipes(tmp_path, capsys) -> None:
    (tmp_path / "r.yaml").write_text("model_name_or_path: a\nimages: b\noutput_dir: c\n")
    args = ["extract", "--config", str(tmp_path / "r.yaml"), "--dry_run", "--json"]
    assert cli.main(args) == 0
    assert json.loads(capsys.readouterr().out) == {"model": "a", "data": "b", "output_dir": "c"}
    assert cli.main([*args, "--model-name-or-path", "x", "--images=y"]) == 0
    assert json.loads(capsys.readouterr().out) == {"model": "x", "data": "y", "output_dir": "c"}


def test_training_runs_have_a_device_too(tmp_path, monkeypatch, capsys, caplog) -> None:
    seen = []
    monkeypatch.setitem(cli.RUNS, "finetune", lambda arguments: seen.append(arguments.use_cpu) or cli.Outcome({}))
    (tmp_path / "r.yaml").write_text("device: cpu\n")
    args = ["finetune", "--output_dir", str(tmp_path / "out")]
    with caplog.at_level(logging.INFO):
        for more in (["--device", "cpu"], ["--config", str(tmp_path / "r.yaml")], ["--use_cpu"]):
            assert cli.main([*args, *more]) == 0, capsys.readouterr().err
    assert seen == [True, True, True]
    assert caplog.text.count("The run uses the device 'cpu'.") == 3
    assert cli.main([*args, "--device", "npu"]) == 1
    assert "error: --device is 'npu', but torch finds only" in capsys.readouterr().err


def test_flags_replace_a_list_of_the_recipe(tmp_path, capsys) -> None:
    (tmp_path / "r.yaml").write_text("model: [a, b]\ndata: d\n")
    args = ["diagnose", "--config", str(tmp_path / "r.yaml"), "--dry_run", "--json"]
    for flags, models in (([], ["a", "b"]), (["--model", "c", "--model", "d", "e"], ["c", "d", "e"])):
        assert cli.main([*args, *flags]) == 0
        assert json.loads(capsys.readouterr().out)["model"] == models


COMMANDS_THAT_WRITE = {
    "convert": [], "diagnose": ["--data", "digits"], "retrofit": ["--data", "digits"], "extract": ["--data", "digits"],
    "dense": ["--data", "digits"], "evaluate": ["--data", "digits"], "finetune": ["--data", "digits"],
    "pretrain": ["--data", "digits"],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS_THAT_WRITE)
def test_where_nothing_can_be_written_is_told_before_the_work(command, tmp_path, capsys, monkeypatch) -> None:
    """Once, a diagnosis read all images and a retrofit searched for minutes before they failed to write a result."""
    (tmp_path / "file").touch()
    args = [command, *(["--model", str(tmp_path / "no model")] if command != "pretrain" else [])]
    args += COMMANDS_THAT_WRITE[command]
    assert cli.main([*args, "--output_dir", str(tmp_path / "file" / "out")]) == 1
    assert f"'{tmp_path}/file' is a file, so '{tmp_path}/file/out' cannot be created" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda place, mode: False)  # root can write anywhere
    assert cli.main([*args, "--output_dir", str(tmp_path / "out")]) == 1
    assert f"'{tmp_path}' is not writable" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_conversion_that_is_stopped_while_it_writes_leaves_no_checkpoint(tmp_path, capsys, monkeypatch):
    """Once, config.json was left without a processor: it loaded with wrong statistics and blocked the next try."""
    vit_folder = tmp_path / "vit"
    tiny_source("ViTModel", **SMALL).save_pretrained(vit_folder)
    from transformers import BaseImageProcessor

    default_image_processor(32).save_pretrained(vit_folder)
    args = ["convert", "--model", str(vit_folder), "--output_dir", str(tmp_path / "out")]
    with monkeypatch.context() as patched:
        patched.setattr(BaseImageProcessor, "save_pretrained", Mock(side_effect=KeyboardInterrupt))
        assert cli.main(args) == 130
    assert "interrupted" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
    assert cli.main(args) == 0


def test_home_folders_in_recipes_and_behind_an_equals_sign(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "recipe.yaml").write_text("model_name_or_path: ~/vit\nimage_size: [32]\n")
    (parsed,) = RecipeParser(ConvertArguments).parse(["--config=~/recipe.yaml", "--output_dir=~/out"])
    assert (parsed.model, parsed.output_dir) == (f"{tmp_path}/vit", f"{tmp_path}/out")
    (parsed,) = RecipeParser(ConvertArguments).parse(["--model", "owner/~name", "--output_dir", "a=~/b"])
    assert (parsed.model, parsed.output_dir) == ("owner/~name", "a=~/b")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["diagnose", "--model", "./nope", "--data", "digits"], "'./nope' is neither a file nor a"),
        (["diagnose", "--model", "a/b/c", "--data", "digits"], "'a/b/c' is neither a file nor a"),
        (["finetune", "--model", "./nope", "--data", "digits", "--use_cpu"], "'./nope' is neither a file nor a"),
        (["pretrain", "--init_from", "./nope", "--data", "digits", "--use_cpu"], "'./nope' is neither a file nor a"),
        (["finetune", "--model", "x", "--data", "digits", "--use_cpu", "--eval_strategy", "steps"],
         "--eval_strategy is 'steps' and --save_strategy is 'epoch', but the best checkpoint can only be loaded if "
         "every evaluated model is saved. Set --save_strategy steps, or"),
    ],
)  # fmt: skip
def test_what_is_not_there_or_does_not_fit_is_told_in_our_words(args, words, tmp_path, capsys) -> None:
    """Once, the message was the Hub's rule for repository names, or named an option that was not given."""
    assert cli.main([*args, "--output_dir", str(tmp_path / "out")]) == 1
    assert words in capsys.readouterr().err


def test_a_command_ends_with_the_command_that_comes_next(tmp_path, monkeypatch, capsys) -> None:
    outcome = cli.Outcome({"a": 1}, lines={"a": 1}, following=("diagnose", "--model", "my runs/a"))
    monkeypatch.setitem(cli.RUNS, "finetune", lambda arguments: outcome)
    args = ["finetune", "--output_dir", str(tmp_path / "out")]
    assert cli.main(args) == 0
    assert capsys.readouterr().out == "a: 1\nnext: regvit diagnose --model 'my runs/a'\n"
    assert cli.main([*args, "--json"]) == 0
    assert capsys.readouterr().out == '{"a": 1}\n'


def test_log_lines_name_options_as_they_are_typed(tmp_path, monkeypatch, capsys) -> None:
    def warn(arguments):
        logging.getLogger("hf_regvit").warning("Increase max_bad_share, or see bad_images.jsonl.")
        return cli.Outcome({})

    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    handler = logging.StreamHandler(stream)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    monkeypatch.setitem(cli.RUNS, "finetune", warn)
    assert cli.main(["finetune", "--output_dir", str(tmp_path / "out")]) == 0
    assert "Increase --max_bad_share, or see bad_images.jsonl.\n" in stream.getvalue()


def test_a_bar_that_did_not_move_is_not_printed_again() -> None:
    stream = io.StringIO()
    lines = hf_regvit_cli._Lines(stream)
    for bar in ("1/9 [00:01<00:08]", "1/9 [00:02<00:16]", "1/9 [00:02<00:16, loss=2]", "2/9 [00:03<00:11, loss=2]"):
        lines.write(f"\r{bar}")
    assert stream.getvalue().splitlines() == [
        "1/9 [00:01<00:08]", "1/9 [00:02<00:16, loss=2]", "2/9 [00:03<00:11, loss=2]"
    ]  # fmt: skip
