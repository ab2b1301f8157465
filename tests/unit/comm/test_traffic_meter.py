"""The byte ledger: what is entered, by whom, and what is seen since the last look."""

from concurrent.futures import ThreadPoolExecutor

import torch

from orchestrator.comm import traffic_meter
from orchestrator.protocol.usage import Traffic, TrafficKind


def test_a_look_shows_what_was_sent_since_the_one_before() -> None:
    since = traffic_meter.Since()
    traffic_meter.enter(TrafficKind.GRADIENT, 10, 4, raw=80)
    traffic_meter.enter(TrafficKind.GRADIENT, 1)
    seen = since.look()
    assert seen[TrafficKind.GRADIENT] == Traffic(raw=81, payload=11, index=4)
    assert seen[TrafficKind.GRADIENT].sent == 15
    assert set(seen) == set(TrafficKind) and not any(since.look()[kind].sent for kind in TrafficKind)


def test_collectives_are_counted_as_a_ring_sends_them() -> None:
    since, tensor = traffic_meter.Since(), torch.zeros(12)
    traffic_meter.enter_gathered(TrafficKind.PARAMETER, tensor, 4)
    traffic_meter.enter_reduced(TrafficKind.CONTROL, tensor, 4)
    traffic_meter.enter_reduced(TrafficKind.TRANSFER, tensor, 1)
    seen = since.look()
    assert [seen[kind].sent for kind in (TrafficKind.PARAMETER, TrafficKind.CONTROL, TrafficKind.TRANSFER)] == [
        36,
        72,
        0,
    ]


def test_threads_lose_nothing() -> None:
    since = traffic_meter.Since()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: traffic_meter.enter(TrafficKind.PROTECTION, 1, 2), range(4000)))
    assert since.look()[TrafficKind.PROTECTION] == Traffic(12000, 4000, 8000)
