from benchmarks import compression, dispatch
from orchestrator.spec.communication import CommunicationSpec


def test_every_arm_is_a_setting_of_a_job() -> None:
    for arm in [*dispatch.ARMS.values(), *({"compression": arm} for arm in compression.ARMS.values())]:
        CommunicationSpec.model_validate(arm)
