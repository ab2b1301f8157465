"""The update rules by name."""

from collections.abc import Callable

from orchestrator.engine.optim.adafactor import Adafactor
from orchestrator.engine.optim.adamw import AdamW
from orchestrator.engine.optim.lion import Lion
from orchestrator.engine.optim.muon import Muon
from orchestrator.engine.optim.rule import UpdateRule
from orchestrator.engine.optim.sgd import SGD
from orchestrator.spec import optimizer as names
from orchestrator.spec.optimizer import OptimizerSpec

RULES: dict[str, Callable[[OptimizerSpec], UpdateRule]] = {
    names.ADAMW: AdamW,
    names.SGD: SGD,
    names.LION: Lion,
    names.MUON: Muon,
    names.ADAFACTOR: Adafactor,
}
