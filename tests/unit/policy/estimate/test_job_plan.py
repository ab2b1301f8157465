"""Plans of jobs; what real ranks hold and send is compared in tests/integration/test_plan.py."""

from typing import Any

import pytest

from orchestrator.checkpoint.hf.shapes import listed
from orchestrator.elastic.state_spec import ParamSpec
from orchestrator.policy.estimate.job_plan import JobPlan, plan_job
from orchestrator.policy.estimate.worker_memory import StatePlan
from orchestrator.spec.job import JobSpec

EXPERTS = tuple(ParamSpec(f"layers.1.mlp.experts.{expert}.down", (1000,), expert) for expert in range(8))
STATE = StatePlan((ParamSpec("dense", (4000,), None), *EXPERTS), (("bias", (8,)),), 512)


def _plan(ours: bool = True, **train: Any) -> JobPlan:
    spec = {"schema": "v1", "name": "try", "workers": "1..4", "model": {"n_routed_experts": 8}, "train": train}
    return plan_job(JobSpec.model_validate(spec), STATE, ours)


def test_a_world_of_one_sends_nothing() -> None:
    (one, *_) = _plan().worlds
    assert one.world_size == 1 and one.traffic.total == 0
    assert [rescale.to_size for rescale in one.rescales] == [2]


def test_sharded_parts_shrink_and_dense_weights_stay() -> None:
    plan = _plan()
    assert plan.num_parameters == plan.num_trained == 12_000
    assert [world.memory.weights for world in plan.worlds] == [48_000, 32_000, 4 * 7000, 4 * 6000]
    moments = [world.memory.moments for world in plan.worlds]
    assert moments == sorted(moments, reverse=True) and moments[0] == 2 * 4 * 12_000
    assert [world.experts for world in plan.worlds] == [(8,), (4, 4), (3, 3, 2), (2, 2, 2, 2)]


def test_tokens_travel_once_per_layer_of_the_model_as_it_is() -> None:
    """Independent of `num_hidden_layers`, which a user's own model need not use."""
    train = {"global_batch_size": 4, "micro_batch_size": 2, "sequence_length": 8}
    traffic = _plan(ours=False, **train).worlds[1].traffic
    rows = round(4 * 8 * (1 - 6 / 28))  # tokens of which both experts are at home stay there
    assert traffic.combine == 2 * rows * 128 * 4  # results, and their gradients
    assert traffic.dispatch == 2 * rows * (128 + 4) * 4  # with a gate for each expert of the receiver


def test_stage_two_reduces_after_every_micro_batch() -> None:
    once, often = (_plan(zero_stage=stage, global_batch_size=16, micro_batch_size=4).worlds[1] for stage in (1, 2))
    assert once.traffic.gradients_reduced == 4 * 4000
    assert often.traffic.gradients_reduced == 2 * once.traffic.gradients_reduced  # 4 micro-batches on 2 workers


def test_bf16_halves_weights_and_gathers() -> None:
    full, half = (_plan(precision=precision).worlds[1] for precision in ("fp32", "bf16"))
    assert half.memory.weights * 2 == full.memory.weights
    assert half.traffic.parameters_gathered * 2 == full.traffic.parameters_gathered
    assert half.memory.masters == full.memory.masters


def test_a_users_model_has_no_estimate_of_activations() -> None:
    memory = _plan(ours=False).worlds[0].memory
    assert memory.activations is None and memory.loss is None
    assert memory.training == memory.weights + memory.masters + memory.moments + memory.buffers + memory.gradients + (
        memory.process
    )


def test_a_rescale_moves_what_the_new_world_lacks() -> None:
    two = _plan().worlds[1]
    down, up = two.rescales
    assert (down.to_size, up.to_size) == (1, 3)
    # To one: the four experts of the other, and the half of all moments and masters' moments that it held.
    assert down.moved_bytes == 4 * 4000 + 2 * 4 * 6000
    assert down.busiest_bytes == down.moved_bytes and down.stall_s == pytest.approx(0.08, abs=0.01)


def test_both_answers_of_a_pair_are_in_memory_and_counted_once() -> None:
    sizes = {"sequence_length": 64, "micro_batch_size": 2, "global_batch_size": 4}
    shared = {"schema": "v1", "name": "plan", "train": sizes, "data": {"source": "pairs.jsonl"}}
    of_pairs, of_chats = (
        plan_job(JobSpec.model_validate({**shared, "task": task}), STATE).worlds[0].memory for task in ("dpo", "sft")
    )
    assert of_pairs.activations is not None and of_chats.activations is not None
    assert of_pairs.activations == 2 * of_chats.activations


def test_copies_of_experts_take_memory_and_their_gradients_travel() -> None:
    def plan(copies: int) -> JobPlan:
        placement = {"placement": {"num_redundant_experts": copies}}
        spec = {
            "schema": "v1",
            "name": "try",
            "workers": "1..4",
            "model": {"n_routed_experts": 8},
            "experts": placement,
        }
        return plan_job(JobSpec.model_validate(spec), STATE)

    without, two, all_copies = (plan(copies) for copies in (0, 2, 24))
    assert [sum(world.experts) for world in two.worlds] == [8, 10, 10, 10]
    assert two.worlds[3].experts == (3, 3, 2, 2)  # a pair of ranks has both
    assert [world.experts for world in all_copies.worlds] == [(8,) * size for size in range(1, 5)]
    for world, plain in zip(two.worlds[1:], without.worlds[1:], strict=True):
        assert world.memory.peak >= plain.memory.peak
        assert world.traffic.gradients_reduced > plain.traffic.gradients_reduced


def test_with_adapters_a_rescale_moves_as_much_less_as_is_trained() -> None:
    """Workers read the other weights from `model.init_from`; their memory is counted."""
    sizes = {"init_from": "/base", "hidden_size": 64, "num_hidden_layers": 2, "n_routed_experts": 4}
    plans = []
    for lora in (None, {"r": 2, "target_modules": ["q_proj", "v_proj"]}):
        spec = {"name": "try", "workers": "1..2", "model": sizes | ({"lora": lora} if lora else {})}
        job = JobSpec.model_validate(spec)
        params, buffers = listed(job.model, 100)
        plans.append(plan_job(job, StatePlan(tuple(params), tuple(buffers), 100)))
    whole, adapted = plans
    assert whole.num_trained == whole.num_parameters == adapted.num_parameters - adapted.num_trained
    one, other = (plan.worlds[0] for plan in plans)
    assert other.memory.weights == one.memory.weights + 4 * adapted.num_trained
    buffers_moved = other.memory.buffers  # the router's bias, of either
    dense = [param for param in listed(job.model, 100)[0] if ".experts." not in param.name]
    trained = sum(param.numel for param in dense if ".lora." in param.name)
    assert trained == adapted.num_trained
    # A newcomer gets the weights, and half of both moments.
    assert other.rescales[0].moved_bytes == pytest.approx(4 * 2 * trained + buffers_moved, abs=4096)
    assert other.rescales[0].moved_bytes < 0.1 * one.rescales[0].moved_bytes
