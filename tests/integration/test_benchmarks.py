"""Every benchmark runs, by its command line. Their figures mean nothing here, what they count does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import balance
from benchmarks.rescale import job_of
from benchmarks.support.confinement import why_not
from benchmarks.support.data import data_spec, prepared, stores_dir
from benchmarks.support.prometheus import missing_programs
from tests.support.hosts import Hosts

ROOT = Path(__file__).parents[2]


def quick(name: str, *options: str) -> dict[str, Any]:
    """The line that a smoke run prints last."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert line["name"] == name
    assert line["settings"]["quick"] is True
    return line


def recoveries(baseline: str, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """A baseline's output for `rounds` kills, with a tiny job of four workers."""
    data = data_spec(True, folder)
    store = prepared(data, stores_dir(True, folder))
    job = job_of("recovery", 2, data, folder, quick=True)
    job = job.model_copy(update={"workers": job.workers.model_copy(update={"initial": 4})})
    (folder / "job.json").write_text(job.model_dump_json(by_alias=True))
    command = [sys.executable, "-m", f"benchmarks.baselines.{baseline}", str(folder / "job.json")]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    done = subprocess.run(
        [*command, str(store.directory), str(rounds)], cwd=ROOT, env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])["rounds"]
    assert len(found) == rounds
    return found


def test_planning() -> None:
    line = quick("planning")
    assert [bar["name"] for bar in line["bars"]] == ["plan_s"]
    assert line["metrics"]["grow"]["moved_bytes"] > 0


def test_journal_starts_from_states() -> None:
    line = quick("journal")
    assert [bar["name"] for bar in line["bars"]] == ["start_s", "rss_growth_mb"]
    assert line["metrics"]["compacted_3000"]["objects"] < line["baselines"]["entries_3000"]["objects"] / 4


def test_checkpoint_writes_the_same_state_in_every_way() -> None:
    line = quick("checkpoint")
    names = ["stall deepspeed over ours", "stall dcp_async over ours", "minute_ratio", "durable_s", "read_ratio"]
    assert [bar["name"] for bar in line["bars"]] == names
    num_bytes = line["metrics"]["num_bytes"]
    assert all(num_bytes["ours"] <= 1.1 * num_bytes[other] for other in ("deepspeed", "dcp_async", "torch_save"))


@pytest.mark.slow
def test_optimizers_are_those_of_the_references() -> None:
    line = quick("optimizers")
    rules = ("adamw", "sgd", "lion", "muon", "adafactor")
    assert {bar["name"] for bar in line["bars"]} == {f"error of {rule}" for rule in rules}
    assert all(bar["met"] for bar in line["bars"])
    assert line["metrics"]["error"]["torch's muon"] > 0


@pytest.mark.ray
@pytest.mark.slow
def test_gpu_runs_on_a_processor_too() -> None:
    line = quick("gpu", "--device", "cpu")
    assert [bar["name"] for bar in line["bars"]] == ["one over transformers"]
    losses = line["metrics"]["first_loss"]
    assert losses["one"] == pytest.approx(losses["transformers"], rel=0.01)
    assert set(line["metrics"]["experts"]["ms"]) == {"grouped", "one by one", "torchtitan"}
    assert line["metrics"]["copies"][0]["copy"]["median"] > 0


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_stalls_compares_commits_by_the_same_job() -> None:
    line = quick("stalls", "--rescale-against", "HEAD", "--recovery-against", "HEAD")
    assert [bar["name"] for bar in line["bars"]] == ["rescale_stall_ratio", "recovery_stall_ratio"]
    for what, kinds in (("rescale", {"2 -> 4", "4 -> 3", "3 -> 1", "1 -> 2"}), ("recovery", {"sigkill"})):
        for arm in ("old", "now", *(["protected"] if what == "rescale" else [])):
            assert set(line["metrics"][what][arm]["by_kind"]) == kinds


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_overhead_compares_loops_that_train_the_same() -> None:
    line = quick("overhead")
    assert [bar["name"] for bar in line["bars"]] == ["ratio_short"]
    assert line["metrics"]["short"]["max_rel_loss_gap"] < 1e-5
    assert line["metrics"]["short"]["ratio"]["median"] > 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_replication_counts_what_snapshots_send() -> None:
    short = quick("replication")["metrics"]["short"]
    sent, unique = short["snapshot_bytes_per_step"], short["unique_bytes"]
    assert 0.95 * unique <= sent["whole"] <= 1.25 * unique  # whatever else uses the device is in it
    assert 0.4 * unique <= sent["every_step"] <= 0.8 * unique
    assert 1 <= short["auto_interval"] <= 64


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_batching_stays_within_its_limit() -> None:
    line = quick("batching")
    assert line["metrics"]["kills"] == 0 and 0 < line["metrics"]["peak_share"][0] < 1
    assert line["metrics"]["packed"]["padding"] == 0 < line["metrics"]["fixed"]["padding"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_rescale_loses_nothing() -> None:
    line = quick("rescale")
    metrics = line["metrics"]
    assert [(t["from"], t["to"]) for t in metrics["transitions"]] == [(2, 4), (4, 3), (3, 1), (1, 2)]
    met = {bar["name"]: bar["met"] for bar in line["bars"]}
    assert met["steps_lost"] and met["state_identical"] and met["bytes_moved"]
    assert metrics["rescales_in_compared_steps"] > 0
    assert metrics["max_rel_loss_gap"] < 1e-5
    assert met["ratio"] is False  # Ray Train isn't run


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_curriculum_compares_equal_tokens() -> None:
    metrics = quick("curriculum")["metrics"]
    assert set(metrics["arms"]) == {"curriculum/length", "anti/length"}
    assert all(loss > 0 for loss in metrics["final_loss"].values())


@pytest.mark.slow
def test_loss_gives_equal_gradients() -> None:
    line = quick("loss")
    assert [bar["name"] for bar in line["bars"]] == ["memory_share", "speed", "sqrt_slope", "gradients_equal"]
    assert line["bars"][3]["met"]


@pytest.mark.slow
def test_moe_layer_compares_the_same_routes() -> None:
    line = quick("moe_layer")
    assert [bar["name"] for bar in line["bars"]] == [
        "speedup_vs_deepspeed",
        "slowest_vs_deepspeed",
        "slowest_vs_transformers",
        "fraction_of_limit_fp32_64",
        "fraction_of_limit_fp32_256",
        "fraction_of_limit_bf16",
    ]
    cases = line["metrics"]["cases"]
    assert {(case["tokens"], case["dtype"], case["routing"]) for case in cases} == {
        (tokens, dtype, routing)
        for tokens in (64, 256)
        for dtype in ("fp32", "bf16")
        for routing in ("balanced", "skewed")
    }
    assert all(set(case["ms"]) == {"ours", "deepspeed", "transformers", "grouped_mm", "bmm"} for case in cases)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_prepare_compares_equal_stores() -> None:
    line = quick("prepare")
    met = {bar["name"]: bar["met"] for bar in line["bars"]}
    assert met.keys() == {"speedup", "peak_memory_ratio", "stores_equal"} and met["stores_equal"]
    assert line["metrics"]["peak_bytes"]["4"] > line["metrics"]["peak_bytes_without_ray"]["4"] > 0


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(bool(missing_programs()), reason="Prometheus isn't installed (Debian: prometheus)")
def test_dashboards_have_samples_of_everything() -> None:
    line = quick("dashboards")
    met = {bar["name"]: bar["met"] for bar in line["bars"]}
    assert met == {"panels_with_samples": True, "alerts_tested": True, "agrees": True}
    assert line["metrics"]["panels"] >= 40 and line["metrics"]["alerts"] == 7 and line["metrics"]["gone_s"] < 60.0


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_low_run_is_shrunk_and_grows_back() -> None:
    line = quick("priorities")
    met = {bar["name"]: bar["met"] for bar in line["bars"]}
    assert met.keys() == {"shrink_s", "steps_lost", "grow_back_s"} and met["steps_lost"]
    assert line["metrics"]["recoveries"] == 0


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_growth_computes_what_was_computed_before() -> None:
    line = quick("experts")
    assert {bar["name"]: bar["met"] for bar in line["bars"]} == {
        "jump at growth, fast": True,
        "losses that differ at growth, exact": True,
    }
    jumps, arms = line["metrics"]["jumps at growth"], line["metrics"]["arms"]
    assert abs(jumps["grown, half drawn anew"][0]) > 1e-5  # the control
    assert jumps["grown, dissolved"] == jumps["grown"]
    assert all(arms[keep]["jump"] != [0.0] for keep in ("reap", "load", "random"))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_router_trains() -> None:
    arms = quick("routers")["metrics"]["arms"]
    assert {name.removeprefix("2 of 16 ") for name in arms} == {balance.OURS, *balance.ROUTERS}
    assert all(arm["per_token"] == pytest.approx(2.0, rel=0.05) for arm in arms.values())
    assert [name for name, arm in arms.items() if arm["dropped"] > 0] == ["2 of 16 capacity 1.25"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_tracking_has_every_value_once() -> None:
    line = quick("tracking")
    met = {bar["name"]: bar["met"] for bar in line["bars"]}
    assert met["missing"] and met["duplicates"]
    assert line["metrics"]["values"] >= 3000 and line["metrics"]["outage_s"] >= 3.0
    assert line["metrics"]["ratio_with_server"]["median"] > 0


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_that_waits_keeps_its_controller_only() -> None:
    metrics = quick("head")["metrics"]
    assert set(metrics) >= {"scheduler_mb", "controller_mb", "controller_child_mb"}
    assert not set(metrics) & {"tracker_mb", "rendezvous_mb", "preparation_mb"}


@pytest.mark.ray
@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root and a loop device")
def test_storage_that_hangs_loses_nothing() -> None:
    met = {bar["name"]: bar["met"] for bar in quick("storage_hangs")["bars"]}
    assert met["workers_lost_by_the_hang"] and met["every_step_published_once"]


@pytest.mark.ray
@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_recovery_loses_nothing() -> None:
    line = quick("recovery")
    met = {bar["name"]: bar["met"] for bar in line["bars"]}
    assert met["committed_steps_lost"] and met["state_identical"] and met["steps_replayed"]
    without_hosts = Hosts.available()
    wanted = {"sigkill"} if without_hosts else {"sigkill", "node_killed", "link_down"}
    assert set(line["settings"]["faults"]) == wanted and bool(line["settings"]["left_out"]) == bool(without_hosts)
    assert all(line["metrics"][kind]["detect_median_s"] > 0 for kind in wanted)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_no_false_alarm_on_busy_cores() -> None:
    line = quick("false_alarms")
    assert [(bar["name"], bar["met"]) for bar in line["bars"]] == [("false_alarms", True)]
    metrics = line["metrics"]
    assert metrics["steps"] > 0 and metrics["rescales"] > 0 and metrics["idle_share"] < 0.5
    assert 0 < metrics["answer_p99_s"] <= metrics["longest_answer_s"]


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_torchrun_recovers_from_its_last_checkpoint(tmp_path: Path) -> None:
    for found in recoveries("torchrun_recovery", 2, tmp_path):
        assert 0 < found["detect_s"] < found["restart_s"] <= found["stall_s"]
        assert 0 <= found["steps_replayed"] <= 5


@pytest.mark.ray
@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_ray_train_recovers_from_its_last_checkpoint(tmp_path: Path) -> None:
    (found,) = recoveries("ray_train_recovery", 1, tmp_path)
    assert 0 < found["detect_s"] < found["restart_s"] <= found["stall_s"]
    assert 0 <= found["steps_replayed"] <= 10  # the controller may not have seen the last checkpoint yet


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compression_counts_bytes_and_moves_what_is_kept() -> None:
    line = quick("compression")
    arms = line["metrics"]["arms"]
    assert arms["none"]["gradient_bytes_saved"] == 0 and arms["int4"]["gradient_bytes_saved"] > 0.85
    assert arms["int8"]["gradient_bytes_saved"] > 0.7 and arms["bf16"]["gradient_bytes_saved"] > 0.48
    bars = {bar["name"]: bar for bar in line["bars"]}
    assert bars["residual_sum_error"]["met"] and bars["bytes_per_rank_topk_most_over_least"]["met"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compute_to_target_trains_both_sides_alike() -> None:
    metrics = quick("compute_to_target")["metrics"]
    dense, recipe = metrics["arms"]["dense, 1"], metrics["arms"]["recipe, 1"]
    assert recipe["parameters"] > 2 * dense["parameters"] and recipe["bytes_sent"] > dense["bytes_sent"]
    assert dense["share_of_experts"] == pytest.approx(recipe["share_of_experts"], rel=0.05)  # of a token's operations
    assert all(0 < side["tried"][0]["loss"] < 10 for side in metrics["sweep"].values())
    assert set(metrics["parts"]) == {"without experts", "without packing"}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_exact_costs_bytes() -> None:
    metrics = quick("exact_cost")["metrics"]["2_workers"]
    assert metrics["gradient_bytes"] == 2.0 and 1.0 < metrics["token_bytes"] < 2.0


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_exact_runs_are_equal_and_fast_ones_are_not() -> None:
    line = quick("exact")
    assert all(bar["met"] for bar in line["bars"]) and line["metrics"]["fp32-1"]["digests"] > 100


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(Hosts.available() is not None, reason=str(Hosts.available()))
@pytest.mark.parametrize("name", ["overlap", "dispatch"])
def test_hosts_with_slow_links_do_steps(name: str) -> None:
    line = quick(name)
    assert len(line["bars"]) >= 2
    if name == "dispatch":
        assert line["metrics"]["arms"]["int8"]["bytes"] < 0.4 and line["metrics"]["arms"]["bf16"]["bytes"] == 0.5


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_tasks_are_compared_with_a_users_own_and_a_plain_loop() -> None:
    line = quick("tasks")
    assert [bar["name"] for bar in line["bars"]] == [
        "cost",
        "accuracy of digits",
        "points below the plain loop",
        "accuracy of dpo",
    ]
    assert line["metrics"]["cost"]["same_bits"]
    for found in line["metrics"]["dpo"].values():
        assert abs(found["first loss"] - 0.6931) < 1e-3


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_balance_trains_each_arm_and_judges_it() -> None:
    line = quick("balance")
    arms = line["metrics"]["arms"]
    assert [name.split(" lr ")[0] for name in arms] == [f"2 of 8 {kind}" for kind in ("none", "old", "ours", "softmax")]
    assert all(measured["loss"] > 0 and 0 < measured["utilisation"] <= 1 for measured in arms.values())
    assert {"early, 2 of 8", "dead, 2 of 8", "loss over old, 2 of 8"} <= {bar["name"] for bar in line["bars"]}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_throughput_measures_all_arms_with_the_same_weights() -> None:
    line = quick("throughput")
    measured = line["metrics"]["fp32"]
    assert set(measured["tokens_per_s"]) == {"one", "two", "engine", "transformers"}
    losses = measured["first_loss"].values()
    assert max(losses) - min(losses) < 1e-3 * min(losses)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_memory_compares_a_worker_with_its_engine_and_its_plan() -> None:
    measured = quick("memory")["metrics"]["1"]
    assert measured["worker"] > measured["engine"] > 100_000_000 and measured["kept"] > 0
    assert measured["ratio"] > 1.0
