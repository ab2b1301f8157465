"""Keys of scaled positions."""

from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.spec.pretrained.config_json import RopeScalingSpec


@pytest.mark.parametrize(
    ("keys", "rule"),
    [
        ({"rope_type": "linear", "factor": 2, "beta_fast": 4}, "only yarn reads beta_fast; got 4.0 for linear"),
        ({"rope_type": "yarn", "factor": 2}, "original_max_position_embeddings is needed for yarn"),
        (
            {"rope_type": "llama3", "factor": 2, "original_max_position_embeddings": 8, "high_freq_factor": 1},
            "high_freq_factor must be above low_freq_factor; got 1.0 and 1.0",
        ),
        ({"rope_type": "dynamic", "factor": 2}, "'linear', 'llama3' or 'yarn'"),
        ({"rope_type": "linear", "factor": 0.5}, "greater than or equal to 1"),
    ],
)
def test_an_invalid_rope_scaling_is_refused(keys: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        RopeScalingSpec.model_validate(keys)


def test_a_config_gets_the_keys_of_its_type() -> None:
    spec = RopeScalingSpec(rope_type="llama3", factor=8, original_max_position_embeddings=8192)
    assert spec.in_config() == {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
