"""How evenly tokens are spread over experts, and what that does to the loss.

    python -m benchmarks.balance [--quick]

Small models are trained on Python's library with the product's model and load balancing, two at a time, each in one
process of one thread, 2,048 tokens a step. Every case (experts, experts per token) is trained with the defaults at two
learning rates, and at the higher one with three controls:

- `old`: the default before: the sign rule with a speed of 0.001, the embedding not scaled,
- `none`: no balancing,
- `softmax`: a softmax router with its auxiliary loss.

A run that has been measured with the same sources is not trained again: results lie in a file beside the prepared text,
so the benchmark may be stopped and goes on where it was. Two cases are trained by the product on Ray as well.

MaxVio is that of single steps unless it says otherwise: of a layer the largest load over the mean load, less one; mean
over layers, then the median over the steps of a stretch, `early` (steps 30 to 100) or `late` (the last fifth).
"""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.harness import ROOT, Bar, Result, at_least, at_most, equals, mean_interval, run, say
from benchmarks.support.data import data_spec, prepared, prepared_storage, stores_dir
from benchmarks.support.product import Product
from orchestrator.data.store import TokenStore
from orchestrator.engine.optim.lr_schedule import learning_rate
from orchestrator.model.base import TrainableModel
from orchestrator.model.factory import build_model, single_rank
from orchestrator.policy.health.expert_load import expert_load
from orchestrator.run_records.run_history import read_steps
from orchestrator.sampling.sampler import SamplerState, sample
from orchestrator.spec.data import DataSpec
from orchestrator.spec.job import JobSpec
from orchestrator.worker.step.routing import move_router_state

STEPS, QUICK_STEPS = 300, 12
SEEDS, QUICK_SEEDS = 3, 1
EARLY = (30, 100)
SUMMED = 20  # steps whose loads are added up
ROWS, LENGTH = 16, 128
LRS = (3e-3, 1e-3)  # the controls are trained at the first
PROCESSES = 2
VALIDATION_ROWS = 512
SOURCES = ("model", "spec", "sampling", "policy/health/expert_load.py")  # that decide how a run ends

OURS = "ours"
CONTROLS: dict[str, dict[str, Any]] = {
    "old": {"bias_update": "sign", "embedding_scale": 1.0},
    "none": {"bias_update_speed": 0.0},
    "softmax": {"scoring_func": "softmax"},
}
ROUTERS: dict[str, dict[str, Any]] = {  # of `benchmarks.routers`
    "attention": {},
    "attention softmax": {"scoring_func": "softmax", "bias_update_speed": 0.5, "router_aux_loss_coef": 0.0},
    "context": {"router": {"scorer": "context", "num_heads": 4, "rank": 4}},
    "softmax bias": {"scoring_func": "softmax", "bias_update_speed": 0.5, "router_aux_loss_coef": 0.0},
    "top_p": {"router": {"selection": "top_p"}},
    "capacity 1.25": {"router": {"capacity_factor": 1.25}},
    "expert_choice": {"router": {"selection": "expert_choice"}},
}


@dataclass(frozen=True)
class Case:
    """A size of the mixture, and what is wanted of it.

    Args:
        early, late: bars of MaxVio of single steps.
        summed: of the loads of 20 steps together.
    """

    num_experts: int
    top_k: int
    expert_size: int
    early: float
    late: float
    summed: float

    @property
    def name(self) -> str:
        return f"{self.top_k} of {self.num_experts}"


CASES = (
    Case(8, 2, 192, 1.5, 0.5, 0.2),
    Case(16, 2, 192, 1.5, 0.5, 0.2),
    Case(64, 2, 64, 3.0, 1.2, 0.5),
    Case(64, 8, 48, 3.0, 1.2, 0.5),
)
ON_RAY = CASES[:2]


@dataclass(frozen=True)
class Arm:
    """One run."""

    case: Case
    kind: str  # OURS, or a control
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.case.name} {self.kind} lr {self.lr:g} seed {self.seed}"

    @property
    def pair(self) -> tuple[Case, float, int]:
        """What an arm and its controls have in common."""
        return self.case, self.lr, self.seed


@dataclass(frozen=True)
class Measured:
    """What a run has shown. MaxVio is the mean over layers, or of the worst one."""

    early: float
    late: float
    late_worst: float
    summed: float
    summed_worst: float
    validation: float
    validation_worst: float
    utilisation: float  # median from step 30 on
    dead: int  # experts that got no token in some 20 steps after the 50th
    loss: float  # of validation, nats
    per_token: float  # experts that a token chose, mean of the last fifth
    dropped: float  # share of these choices


def measure(quick: bool) -> Result:
    seeds, steps = (QUICK_SEEDS, QUICK_STEPS) if quick else (SEEDS, STEPS)
    cases = CASES[:1] if quick else CASES
    lrs = LRS[:1] if quick else LRS
    arms = [Arm(case, OURS, lr, seed) for seed in range(seeds) for case in cases for lr in lrs]
    arms += [Arm(case, kind, LRS[0], seed) for seed in range(seeds) for case in cases for kind in CONTROLS]
    with tempfile.TemporaryDirectory(prefix="balance-") as folder:
        workspace = Path(folder)
        data = data_spec(quick, workspace)
        stores = stores_dir(quick, workspace)
        store = prepared(data, stores)
        results = results_file(stores, data, steps)
        found = train_all(arms, steps, data, store.directory, results)
        on_ray = {case.name: train_on_ray(case, quick, steps) for case in ([] if quick else ON_RAY)}
    return result_of(quick, steps, found, on_ray)


# -- in one process --------------------------------------------------------------------------------------------------


def train_all(arms: Sequence[Arm], steps: int, data: DataSpec, store: Path, results: Path) -> dict[Arm, Measured]:
    """What every arm has shown; those that the results file has are not trained again."""
    known = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    by_name = {entry["arm"]: Measured(**entry["measured"]) for entry in known}
    found = {arm: by_name[arm.name] for arm in arms if arm.name in by_name}
    missing = [arm for arm in arms if arm not in found]
    say(f"{len(found)} of {len(arms)} runs are in {results}")
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        begun = {pool.submit(train, arm, steps, data, store): arm for arm in missing}
        for done in as_completed(begun):
            arm, measured = begun[done], done.result()
            found[arm] = measured
            with results.open("a") as file:
                print(json.dumps({"arm": arm.name, "measured": asdict(measured)}), file=file)
            say(f"{arm.name}: {measured}")
    return found


def results_file(directory: Path, data: DataSpec, steps: int) -> Path:
    """Named by all that the results depend on."""
    of = hashlib.sha256(f"{data.model_dump_json()} {steps} {CASES} {CONTROLS} {ROUTERS}".encode())
    for source in (Path(__file__), *(ROOT / "orchestrator" / room for room in SOURCES)):
        for file in sorted(source.rglob("*.py")) if source.is_dir() else [source]:
            of.update(file.read_bytes())
    return directory / f"balance-{of.hexdigest()[:12]}.jsonl"


def job_of(arm: Arm, steps: int, data: DataSpec) -> JobSpec:
    model = {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 384,
        "n_routed_experts": arm.case.num_experts,
        "num_experts_per_tok": arm.case.top_k,
        "moe_intermediate_size": arm.case.expert_size,
        **{**CONTROLS, **ROUTERS}.get(arm.kind, {}),
    }
    if arm.kind.startswith("attention"):  # as many parameters as a linear router has
        num_experts, size = arm.case.num_experts, model["hidden_size"]
        model["router"] = {"scorer": "attention", "rank": round(num_experts * size / (num_experts + size))}
    batch = {"global_batch_size": ROWS, "micro_batch_size": ROWS, "sequence_length": LENGTH}
    train = {**batch, "max_steps": steps, "lr": arm.lr, "seed": arm.seed}
    return JobSpec.model_validate({"name": "balance", "model": model, "train": train, "data": data})


def train(arm: Arm, steps: int, data: DataSpec, store_dir: Path) -> Measured:
    """One run from beginning to end, in this process."""
    torch.set_num_threads(1)
    job, store = job_of(arm, steps, data), TokenStore.open(store_dir)
    spec, options = job.train, job.train.optimizer
    model = build_model(job.model, store.vocab_size, single_rank(job.model))
    model.init_weights(spec.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), spec.lr, options.betas, options.eps, options.weight_decay, fused=True
    )
    num_rows = store.num_rows("train", LENGTH)
    sampler = SamplerState(seed=spec.seed, global_batch_size=ROWS, sequence_length=LENGTH, num_rows=num_rows)
    counts, dropped = [], []
    for step in range(steps):
        lr = learning_rate(spec, step)
        rows = store.rows("train", sample(sampler, step), LENGTH)
        loss = model(torch.from_numpy(rows.inputs_RT), torch.from_numpy(rows.targets_RT))
        routed = model.routing_counts()
        (loss / int((rows.targets_RT >= 0).sum())).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            move_router_state(job, model, routed, step)
        counts.append(routed.counts_LE.numpy())
        dropped.append(int(routed.dropped_L.sum()))
    loss_value, validation = validated(model, store)
    return measured_of(np.stack(counts), validation, loss_value, dropped)


@torch.no_grad()
def validated(model: TrainableModel, store: TokenStore) -> tuple[float, NDArray[np.int64]]:
    """The loss on rows drawn from the validation split, and the loads in each batch of them, with the last bias."""
    model.eval()
    num_rows = store.num_rows("validation", LENGTH)
    drawn = np.random.default_rng(0).permutation(num_rows)[:VALIDATION_ROWS]
    loss_sum, num_targets, counts = 0.0, 0, []
    for batch in np.split(drawn, range(ROWS, len(drawn), ROWS)):
        rows = store.rows("validation", np.sort(batch), LENGTH)
        loss_sum += float(model(torch.from_numpy(rows.inputs_RT), torch.from_numpy(rows.targets_RT)))
        num_targets += int((rows.targets_RT >= 0).sum())
        if len(batch) == ROWS:
            counts.append(model.routing_counts().counts_LE.numpy())
    return loss_sum / num_targets, np.stack(counts)


def measured_of(
    counts_SLE: NDArray[np.int64], validation_BLE: NDArray[np.int64], loss: float, dropped_S: Sequence[int]
) -> Measured:
    """
    Args:
        counts_SLE: load of each expert, by step.
        validation_BLE: the same by batch of validation rows.
        dropped_S: choices that were dropped, by step.
    """
    steps = len(counts_SLE)
    early = slice(*EARLY) if steps > EARLY[1] else slice(0, steps)
    late = steps * 4 // 5
    violation_SL = violations(counts_SLE)
    sums = [counts_SLE[at : at + SUMMED].sum(0) for at in range(late, max(steps - SUMMED, late) + 1)]
    summed_L = np.median(violations(np.stack(sums)), 0)
    after = counts_SLE[50:]
    windows = [after[at : at + SUMMED].sum(0) for at in range(0, len(after) - SUMMED + 1, SUMMED)]
    validation_BL = violations(validation_BLE)
    return Measured(
        early=float(np.median(violation_SL[early].mean(1))),
        late=float(np.median(violation_SL[late:].mean(1))),
        late_worst=float(np.median(violation_SL[late:], 0).max()),
        summed=float(summed_L.mean()),
        summed_worst=float(summed_L.max()),
        validation=float(np.median(validation_BL.mean(1))),
        validation_worst=float(np.median(validation_BL, 0).max()),
        utilisation=median(expert_load(counts_LE).utilisation for counts_LE in counts_SLE[min(30, steps - 1) :]),
        dead=sum(int((window == 0).sum()) for window in windows),
        loss=loss,
        per_token=float(counts_SLE[late:].sum() / (ROWS * LENGTH * counts_SLE.shape[1] * (steps - late))),
        dropped=sum(dropped_S[late:]) / float(counts_SLE[late:].sum()),
    )


def violations(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """MaxVio of each layer; the last dimension is experts."""
    return np.asarray(counts.max(-1) / counts.mean(-1) - 1.0)


# -- by the product --------------------------------------------------------------------------------------------------


def train_on_ray(case: Case, quick: bool, steps: int) -> dict[str, float]:
    """The same job on Ray with two workers: MaxVio late in the run, from its records."""
    with tempfile.TemporaryDirectory(prefix="balance-ray-") as folder:
        workspace = Path(folder)
        there = prepared_storage(quick, workspace)
        job = job_of(Arm(case, OURS, LRS[0], 0), steps, there.data)
        plain = job.model_dump(mode="json", exclude_unset=True)
        plain["train"]["micro_batch_size"] = ROWS // 4
        plain |= {"storage": str(there.storage), "workers": {"min": 1, "max": 2, "initial": 2}}
        with Product(workspace / "home", num_cpus=4) as product:
            run_id = product.client.submit(JobSpec.model_validate(plain))
            status = product.client.wait(run_id)
            say(f"{case.name} on Ray: {status.phase}")
        records = read_steps(there.storage / run_id)
    late = [record.routing.experts for record in records if record.step >= steps * 4 // 5]
    early = [record.routing.experts for record in records if EARLY[0] <= record.step < EARLY[1]]
    return {
        "early": median(load.max_violation for load in early),
        "late": median(load.max_violation for load in late),
        "late_worst": median(load.worst_violation for load in late),
    }


# -- the result ------------------------------------------------------------------------------------------------------


def result_of(quick: bool, steps: int, found: dict[Arm, Measured], on_ray: dict[str, dict[str, float]]) -> Result:
    ours = {arm: measured for arm, measured in found.items() if arm.kind == OURS}
    by_pair = {(arm.pair, arm.kind): measured for arm, measured in found.items()}
    bars: list[Bar] = []
    for case in dict.fromkeys(arm.case for arm in ours):
        mine = [measured for arm, measured in ours.items() if arm.case == case]
        of_case = case.name
        bars += [
            at_most(f"early, {of_case}", case.early, max(m.early for m in mine)),
            at_most(f"late, {of_case}", case.late, max(m.late for m in mine)),
            at_most(f"late, worst layer, {of_case}", 2 * case.late, max(m.late_worst for m in mine)),
            at_most(f"summed, {of_case}", case.summed, max(m.summed for m in mine)),
            at_most(f"summed, worst layer, {of_case}", 2 * case.summed, max(m.summed_worst for m in mine)),
            at_most(f"validation, {of_case}", case.late, max(m.validation for m in mine)),
            at_most(f"validation, worst layer, {of_case}", 2 * case.late, max(m.validation_worst for m in mine)),
            equals(f"dead, {of_case}", 0, sum(m.dead for m in mine)),
        ]
        paired = [arm for arm in ours if arm.case == case and (arm.pair, "none") in by_pair]
        gains = [ours[arm].utilisation / by_pair[arm.pair, "none"].utilisation for arm in paired]
        bars.append(at_least(f"utilisation over none, {of_case}", 1.3, min(gains)))
        for kind in CONTROLS:
            gaps = [ours[arm].loss / by_pair[arm.pair, kind].loss - 1 for arm in paired]
            gap = mean_interval(gaps) if len(gaps) > 1 else gaps[0]
            bars.append(at_most(f"loss over {kind}, {of_case}", 0.005, gap))
    for name, shown in on_ray.items():
        case = next(case for case in CASES if case.name == name)
        bars += [at_most(f"{what}, {name} on Ray", getattr(case, what), shown[what]) for what in ("early", "late")]
    table: dict[str, Any] = {}
    for arm, measured in sorted(found.items(), key=lambda entry: entry[0].name):
        table.setdefault(f"{arm.case.name} {arm.kind} lr {arm.lr:g}", []).append(asdict(measured))
    return Result(
        name="balance",
        seed=0,
        settings={"quick": quick, "steps": steps, "cases": [asdict(case) for case in CASES], "controls": CONTROLS},
        rounds=len({arm.seed for arm in found}),
        metrics={
            "arms": {name: {key: mean(row[key] for row in rows) for key in rows[0]} for name, rows in table.items()},
            "on_ray": on_ray,
        },
        bars=tuple(bars),
    )


if __name__ == "__main__":
    run(__doc__, measure)
