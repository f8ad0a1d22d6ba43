"""The policy for skips in the common suite of transformers, without the suite."""

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import hf_regvit
from helpers import load_script

ROOT = Path(__file__).resolve().parents[1]


skip_reasons = load_script("tests/hf_common/skip_reasons.py")

KNOWN = ("test_inputs_embeds", "RegViT takes pixel_values, not inputs_embeds")
UNKNOWN = ("test_of_the_next_release", "No capability of a name that nobody knows yet")


@pytest.mark.parametrize("version", ["5.15.1", "5.24.0", "5.99.0", "6.0.0"])
def test_a_listed_reason_is_allowed_in_every_version(version):
    assert skip_reasons.verdict(*KNOWN, version=version) == "allowed"


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("5.15.1", "failed"), ("5.23.0", "failed"), ("5.24.0", "failed"), ("5.24.0.dev0", "failed"),
        ("5.24.1", "listed"), ("5.25.0", "listed"), ("5.100.0", "listed"), ("6.0.0", "listed"),
    ],
)  # fmt: skip
def test_an_unknown_reason_fails_up_to_the_tested_version(version, expected, monkeypatch):
    monkeypatch.setattr(skip_reasons, "TESTED_VERSION", "5.24.0")
    assert skip_reasons.verdict(*UNKNOWN, version=version) == expected


def test_raising_the_tested_version_makes_its_unknown_reasons_failures(monkeypatch):
    monkeypatch.setattr(skip_reasons, "TESTED_VERSION", "5.25.0")
    assert skip_reasons.verdict(*UNKNOWN, version="5.25.0") == "failed"


def test_a_reason_that_is_right_for_one_test_is_unknown_for_another():
    reason = "Do not take a cache as input to forward"
    tested = skip_reasons.TESTED_VERSION
    assert skip_reasons.verdict("test_bc_cache_name_forward", reason, version=tested) == "allowed"
    assert skip_reasons.verdict("test_eager_matches_sdpa_inference", reason, version=tested) == "failed"


def test_the_tested_version_has_a_digest_and_is_one_that_the_package_accepts():
    tested = skip_reasons.TESTED_VERSION
    assert tested in load_script("scripts/dev/get_hf_common_tests.py").DIGESTS
    requirements = map(Requirement, importlib.metadata.requires(hf_regvit.__name__))
    assert next(r for r in requirements if r.name == "transformers").specifier.contains(Version(tested))
