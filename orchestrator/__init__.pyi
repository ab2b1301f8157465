from orchestrator.client import OrchestratorClient
from orchestrator.ray_train.trainer import ElasticTrainer

__all__ = ["ElasticTrainer", "OrchestratorClient"]
