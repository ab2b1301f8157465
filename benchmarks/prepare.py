"""What Ray Data brings to preparing text, and how much memory that takes.

    python -m benchmarks.prepare [--quick]

The text is that of the installed Python packages, as JSON lines, tokenised with the same given tokenizer to the same
store by four arms, each in a process of its own:

    cluster    `orchestrator data prepare` on a Ray of 2 CPUs: what is timed begins when that Ray is up and cold
    plain      `prepare` as a job calls it: one process, a loop over the documents with the tokenizers library,
               TOKENIZERS_PARALLELISM=false
    parallel   the same with the tokenizer's own threads, `encode_batch` of a megabyte at once
    alone      what `cluster` does, its table of words included, in one process without Ray: no bar, it tells which part
               of the speedup is the table's and which the cluster's

Memory is the most that the process, its Ray and all of its workers hold together: proportional set sizes, so that what
they share counts once, looked at four times a second. It is taken once with the text and once with four times as much,
all of it different. Linux only, as it is read from /proc.
"""

import json
import multiprocessing
import os
import shutil
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import Result, Spread, alternate, at_least, at_most, equals, median_interval, ratios, run, say
from orchestrator.data.prepare import ray_map
from orchestrator.data.prepare.job_store import prepare
from orchestrator.data.prepare.pipeline import prepare_corpora
from orchestrator.data.prepare.request import Request
from orchestrator.data.tokenizer import TextTokenizer

CPUS = 2
TIMES = 4  # as much text for the second figure of memory
LOOK_EVERY_S = 0.25
SIZES = {"text_bytes": 104_000_000, "memory_text_bytes": 52_000_000, "file_bytes": 8_000_000, "vocab_size": 8192}
QUICK_SIZES = {"text_bytes": 1_000_000, "memory_text_bytes": 500_000, "file_bytes": 200_000, "vocab_size": 300}
TOKENIZER_TEXT_BYTES = 8_000_000


def measure(quick: bool) -> Result:
    sizes, rounds = (QUICK_SIZES, 1) if quick else (SIZES, 2)
    with tempfile.TemporaryDirectory(prefix="orchestrator-prepare-") as folder:
        workspace = Path(folder)
        corpus = write_corpus(workspace / "text", sizes["text_bytes"], sizes["file_bytes"])
        tokenizer = workspace / "tokenizer.json"
        learn(corpus, sizes["vocab_size"]).save(tokenizer)
        say(f"{sizes['text_bytes'] / 1e6:.0f} MB of text in {len(list(corpus.iterdir()))} files")
        digests: set[str] = set()
        starts_s: list[float] = []

        def arm(name: str) -> Callable[[], float]:
            def timed() -> float:
                told = in_a_process(ARMS[name], corpus, tokenizer, workspace / "stores", False)
                digests.add(told["digest"])
                starts_s.extend([told["ray_start_s"]] if "ray_start_s" in told else [])
                say(f"{name}: {told['seconds']:.1f} s")
                return float(told["seconds"])

            return timed

        seconds = alternate({name: arm(name) for name in ARMS}, rounds)
        memory: dict[int, dict[str, Any]] = {}
        for times in (1, TIMES):
            larger = write_corpus(workspace / f"text-{times}", times * sizes["memory_text_bytes"], sizes["file_bytes"])
            memory[times] = in_a_process(on_ray, larger, tokenizer, workspace / "stores", True)
        say(f"peak bytes: {[told['peak_bytes'] for told in memory.values()]}")
    speedups = {name: median_interval(ratios(seconds[name], seconds["cluster"])) for name in ARMS if name != "cluster"}
    metrics: dict[str, Any] = {
        "seconds": {name: Spread.of(values) for name, values in seconds.items()},
        "mb_per_s": {
            name: Spread.of([sizes["text_bytes"] / 1e6 / s for s in found]) for name, found in seconds.items()
        },
        "speedup": speedups["plain"],
        "speedup_over_parallel": speedups["parallel"],
        "speedup_over_alone": speedups["alone"],
        "ray_start_s": Spread.of(starts_s),
        "peak_bytes": {str(times): told["peak_bytes"] for times, told in memory.items()},
        "peak_bytes_without_ray": {str(times): told["peak_bytes_without_ray"] for times, told in memory.items()},
        "peak_memory_ratio": memory[TIMES]["peak_bytes"] / memory[1]["peak_bytes"],
        "peak_memory_ratio_without_ray": memory[TIMES]["peak_bytes_without_ray"] / memory[1]["peak_bytes_without_ray"],
    }
    return Result(
        name="prepare",
        seed=0,
        settings={"quick": quick, "cpus": CPUS, "times": TIMES, **sizes},
        rounds=rounds,
        metrics=metrics,
        baselines={
            "plain": "one process, TOKENIZERS_PARALLELISM=false",
            "parallel": "one process, encode_batch",
            "alone": "one process, blocks with the table of words",
        },
        bars=(
            at_least("speedup", 1.6, metrics["speedup"]),
            at_most("peak_memory_ratio", 1.15, metrics["peak_memory_ratio"]),
            equals("stores_equal", True, len(digests) == 1),
        ),
    )


def write_corpus(folder: Path, text_bytes: int, file_bytes: int) -> Path:
    """JSON lines with `text_bytes` of source code, repeated under another heading if need be."""
    folder.mkdir()
    num_files = written = in_file = 0
    file = (folder / "00000.jsonl").open("w", encoding="utf-8")
    for text in sources():
        file.write(json.dumps({"text": text}) + "\n")
        num_bytes = len(text.encode("utf-8"))
        written, in_file = written + num_bytes, in_file + num_bytes
        if written >= text_bytes:
            break
        if in_file >= file_bytes:
            file.close()
            num_files, in_file = num_files + 1, 0
            file = (folder / f"{num_files:05}.jsonl").open("w", encoding="utf-8")
    file.close()
    return folder


def sources() -> Iterator[str]:
    """The packages' modules, over and over, each time headed by another line."""
    paths = sorted(Path(sysconfig.get_path("purelib")).rglob("*.py"))
    turn = 0
    while True:
        for path in paths:
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                yield f"# {turn}\n{text}" if turn else text
        turn += 1


def learn(corpus: Path, vocab_size: int) -> TextTokenizer:
    texts: list[str] = []
    for path in sorted(corpus.iterdir()):
        texts += [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    share = max(1, sum(map(len, texts)) // TOKENIZER_TEXT_BYTES)
    return TextTokenizer.train(texts[::share], vocab_size)


# -- arms: each gets (corpus, tokenizer, where stores lie, whether to look at memory) ---------------------------------


def on_ray(corpus: Path, tokenizer: Path, stores: Path, looks: bool) -> dict[str, Any]:
    import ray

    temp_dir = tempfile.mkdtemp(prefix="op-", dir="/tmp")  # sockets need a short path
    os.environ["RAY_AUTH_MODE"] = "disabled"
    began_s = time.perf_counter()
    ray.init(address="local", num_cpus=CPUS, include_dashboard=False, log_to_driver=False, _temp_dir=temp_dir)
    told: dict[str, Any] = {"ray_start_s": time.perf_counter() - began_s}
    look = Look() if looks else None
    try:
        began_s = time.perf_counter()
        told["digest"] = in_blocks(corpus, tokenizer, stores, ray_map.on_cluster)
        told["seconds"] = time.perf_counter() - began_s
    finally:
        told |= {} if look is None else look.ended()
        ray.shutdown()
        shutil.rmtree(temp_dir, ignore_errors=True)
    return told


def plain(corpus: Path, tokenizer: Path, stores: Path, looks: bool) -> dict[str, Any]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return parallel(corpus, tokenizer, stores, looks)


def parallel(corpus: Path, tokenizer: Path, stores: Path, looks: bool) -> dict[str, Any]:
    began_s = time.perf_counter()
    digest = prepare(str(corpus), 0, 0.05, stores, tokenizer=tokenizer).digest
    return {"digest": digest, "seconds": time.perf_counter() - began_s}


def alone(corpus: Path, tokenizer: Path, stores: Path, looks: bool) -> dict[str, Any]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    began_s = time.perf_counter()
    digest = in_blocks(corpus, tokenizer, stores, map)
    return {"digest": digest, "seconds": time.perf_counter() - began_s}


def in_blocks(corpus: Path, tokenizer: Path, stores: Path, spread: ray_map.Spread) -> str:
    request = Request((str(corpus),), tokenizer=tokenizer, deduplicate=False)
    return prepare_corpora(request, stores, spread).store.digest


ARMS = {"cluster": on_ray, "plain": plain, "parallel": parallel, "alone": alone}


def in_a_process(work: Callable[..., dict[str, Any]], corpus: Path, tokenizer: Path, stores: Path, looks: bool) -> Any:
    """What `work` tells, from a fresh process with two cores, if there are more."""
    shutil.rmtree(stores, ignore_errors=True)
    with multiprocessing.get_context("spawn").Pool(1, _pinned) as pool:
        return pool.apply(work, (corpus, tokenizer, stores, looks))


def _pinned() -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CPUS])


class Look:
    """Looks at the memory of this process and all below it, until `ended`."""

    def __init__(self) -> None:
        self._peaks = [0, 0]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def ended(self) -> dict[str, int]:
        self._over.set()
        self._thread.join()
        return {"peak_bytes": self._peaks[0], "peak_bytes_without_ray": self._peaks[1]}

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._over.wait(LOOK_EVERY_S):
            held = {process.pid: _held(process) for process in [me, *me.children(recursive=True)]}
            everything = sum(num_bytes for num_bytes, _ in held.values())
            mine = sum(num_bytes for num_bytes, is_system in held.values() if not is_system)
            self._peaks = [max(self._peaks[0], everything), max(self._peaks[1], mine)]


def _held(process: psutil.Process) -> tuple[int, bool]:
    """Proportional set size in bytes, and whether it is one of Ray's own processes rather than a worker or us."""
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        pss = next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return pss, process.pid != os.getpid() and not process.cmdline()[0].startswith("ray::")
    except (OSError, StopIteration, IndexError, psutil.Error):  # it has ended meanwhile
        return 0, True


if __name__ == "__main__":
    run(__doc__, measure)
