"""The tier of the transformers common suite: its marker, upstream's markers, and no skip without an allowed reason."""

import re
from collections import Counter
from pathlib import Path

import pytest
from skip_reasons import group_of

HERE = Path(__file__).parent

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
    """Turn a skip whose reason is not in `skip_reasons.ALLOWED` into a failure."""
    report = yield
    if report.skipped and HERE in item.path.parents and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if group_of(item.name, reason) is None:
            report.outcome = "failed"
            report.longrepr = (
                f"{item.name} skipped itself: {reason!r}. tests/hf_common/skip_reasons.py does not list that reason: "
                "make the test run, or add the reason there and say why it is right."
            )
    return report


def pytest_terminal_summary(terminalreporter):
    groups = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        if "hf_common/" in report.nodeid and isinstance(report.longrepr, tuple):
            reason = report.longrepr[2].removeprefix("Skipped: ")
            groups[group_of(report.nodeid.rpartition("::")[2], reason) or reason] += 1
    if groups:
        terminalreporter.section("skips of the transformers common suite")
        for group, count in groups.most_common():
            terminalreporter.write_line(f"{count:4d}  {group}")
