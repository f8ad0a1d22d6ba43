"""Every reason for which a test of the common suite may be skipped here, and the policy for any other reason.

A pattern is searched in "name of the test: reason", so that a reason which is right for one test only says which.
"""

import re
from typing import Literal

from packaging.version import Version

# The newest release of transformers whose common suite has been run and whose skips are all listed below. After a run
# of a newer suite: add its new reasons, this version, and its digest in scripts/dev/get_hf_common_tests.py.
TESTED_VERSION = "5.24.0"

ALLOWED = {
    "another modality, task or kind of model": (
        r"is not in `self\.pipeline_model_mapping`",
        r"test_pipeline_\w+: `run_pipeline_test` is currently not implemented",
        r"test_pipeline_\w+: test requires (PyTesseract|av)",
        r"No (sequence-to-sequence|decoder-only) language modeling head to check",
        r"RegViT takes pixel_values, not inputs_embeds",
        r"This model doesn't use `inputs_embeds`",
        r"test_resize_embeddings is set to `False`",
        r"test_resize_position_vector_embeddings: Model does not have position embeddings",  # looked up by token index
        r"Model does not support sliding window mask",
        r"This model does not (support RoPE scaling|have RoPE)",
        r"has no axial RoPE layer defined",
        r"test_bc_cache_name_forward: Do not take a cache as input to forward",  # nothing is generated token by token
        r"This model has no (sparse experts|`output_router_logits` in its config)",
        r"test_eager_matches_batched_and_grouped_inference\w*: .* does not support grouped_mm",  # mixtures of experts
        r"composite_models?: (This model is not composite|Model is not a composite model)",
        r"test_sdpa_can_dispatch_composite_models: .* does not support SDPA",  # upstream's words for "not composite"
        r"No subconfigs so the test does not make sense",
    ),
    "needs an accelerator or a package that is not installed": (
        r"test requires (multiple accelerators|accelerator|CUDA|MPS)",
        r"test requires (Flash Attention( \d)?|the kernels library|deepspeed|bitsandbytes)",
        r"test_torch_compile_for_training: test is slow",
    ),
    "RegViT does not have the feature that is tested": (
        r"No conversion found for",  # the names on disk are the names in memory
        r"test_capture_outputs_decorator: No usage of the `capture_outputs` decorator",  # collected by hand
        r"test_can_capture_specific_layers_hidden_states: Cannot capture hidden states",  # likewise
        r"has no _keep_in_fp32_modules n?or _keep_in_fp32_modules_strict",
        r"class has no _keep_in_fp32_modules",
        r"test_keep_in_fp32_modules_strict\w*: No `_keep_in_fp32_modules_strict` defined",
        r"Model does not have a TP plan",
    ),
}


def group_of(test: str, reason: str) -> str | None:
    """The heading under which this skip is allowed; None if it is not."""
    for group, patterns in ALLOWED.items():
        if any(re.search(pattern, f"{test}: {reason}") for pattern in patterns):
            return group
    return None


def verdict(test: str, reason: str, *, version: str) -> Literal["allowed", "failed", "listed"]:
    """Decide on a skip in the common suite of one version of transformers.

    An unknown reason fails the test up to the tested version. In a newer suite it is only listed in the summary: the
    release of a dependency adds tests that skip themselves, and must not break this project's tests.
    """
    if group_of(test, reason) is not None:
        return "allowed"
    return "listed" if Version(version) > Version(TESTED_VERSION) else "failed"
