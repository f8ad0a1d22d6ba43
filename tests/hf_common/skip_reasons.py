"""Every reason for which a test of the common suite may be skipped here. Any other skip fails the tier.

A pattern is searched in "name of the test: reason", so that a reason which is right for one test only says which.
"""

import re

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
        r"Model does not have a TP plan",
    ),
}


def group_of(test: str, reason: str) -> str | None:
    """The heading under which this skip is allowed; None if it is not."""
    for group, patterns in ALLOWED.items():
        if any(re.search(pattern, f"{test}: {reason}") for pattern in patterns):
            return group
    return None
