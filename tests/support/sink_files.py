"""What TensorBoard and Weights & Biases read from the files of our sinks, by their own readers."""

import json
from collections import defaultdict
from pathlib import Path

Curve = list[tuple[int, float]]  # steps and values, as they were written


def of_tensorboard(directory: Path) -> dict[str, Curve]:
    """Curves in all event files of a folder, by tag, in order of their steps: names of files order those of one second
    by process."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    reader.Reload()
    return {tag: sorted((each.step, each.value) for each in reader.Scalars(tag)) for tag in reader.Tags()["scalars"]}


def of_wandb(directory: Path) -> tuple[dict[str, Curve], dict[str, object], int]:
    """Curves, summary and exit code of the one offline run in a folder."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    (file,) = directory.glob("wandb/offline-run-*/*.wandb")
    store, curves, summary, exit_code = DataStore(), defaultdict[str, Curve](list), dict[str, object](), -1
    store.open_for_scan(str(file))
    while data := store.scan_data():
        record = Record.FromString(data)
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for key in row.keys() - {"step"} if "step" in row else ():
            if not key.startswith("_"):
                curves[key].append((row["step"], float(row[key])))
        summary |= {item.key: json.loads(item.value_json) for item in record.summary.update}
        exit_code = record.exit.exit_code if record.HasField("exit") else exit_code
    return dict(curves), summary, exit_code
