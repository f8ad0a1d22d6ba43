"""The tier of the transformers common suite: its marker, upstream's markers, and its policy for skips."""

import importlib.metadata
import re
from collections import Counter
from pathlib import Path

import pytest
from skip_reasons import TESTED_VERSION, group_of, verdict

HERE = Path(__file__).parent
VERSION = importlib.metadata.version("transformers")

UPSTREAM_MARKERS = (
    "accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "generate", "is_pipeline_test",
    "is_training_test", "order", "torch_compile_test", "torch_export_test", "training_ci",
)  # fmt: skip


def pytest_configure(config):
    for marker in UPSTREAM_MARKERS:
        config.addinivalue_line("markers", f"{marker}: used by the common suite of transformers")


def pytest_ignore_collect(collection_path, config):
    """Leave the tier alone, and its imports of several seconds, where the marker expression excludes it anyway."""
    if collection_path.suffix == ".py" and re.search(r"\bnot\s+hf_common\b", config.option.markexpr):
        return True
    return None


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("hf_common")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Turn a skip whose reason is unknown into a failure, up to the tested version of transformers."""
    report = yield
    if report.skipped and HERE in item.path.parents and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if verdict(item.name, reason, version=VERSION) == "failed":
            report.outcome = "failed"
            report.longrepr = (
                f"{item.name} skipped itself: {reason!r}. tests/hf_common/skip_reasons.py does not list that reason: "
                "make the test run, or add the reason there and say why it is right."
            )
    return report


def pytest_terminal_summary(terminalreporter):
    groups, unknown = Counter(), Counter()
    for report in terminalreporter.stats.get("skipped", []):
        if "hf_common/" in report.nodeid and isinstance(report.longrepr, tuple):
            test, reason = report.nodeid.rpartition("::")[2], report.longrepr[2].removeprefix("Skipped: ")
            if verdict(test, reason, version=VERSION) == "listed":
                unknown[f"{test}: {reason}"] += 1
            else:
                groups[group_of(test, reason) or reason] += 1
    if groups:
        terminalreporter.section("skips of the transformers common suite")
        for group, count in groups.most_common():
            terminalreporter.write_line(f"{count:4d}  {group}")
    if unknown:
        terminalreporter.section("skips of the transformers common suite with an unknown reason")
        terminalreporter.write_line(
            f"transformers {VERSION} is newer than {TESTED_VERSION}, the tested version, so these are no failures. "
            "Add each reason to tests/hf_common/skip_reasons.py, or make the test run, then raise TESTED_VERSION."
        )
        for line, count in unknown.most_common():
            terminalreporter.write_line(f"{count:4d}  {line}")
