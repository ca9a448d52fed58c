"""Every command's settings as frozen dataclasses. Loads neither torch nor transformers. The docstring of a field is its
help text."""

from ddpo.config.data import PrepareConfig, WeighConfig, Weighing
from ddpo.config.reward import RewardConfig, ScoreConfig
from ddpo.config.sampling import DemoConfig, EvaluateConfig, GenerateConfig
from ddpo.config.training import PlanConfig, TrainConfig, TuneConfig

__all__ = [
    "DemoConfig",
    "EvaluateConfig",
    "GenerateConfig",
    "PlanConfig",
    "PrepareConfig",
    "RewardConfig",
    "ScoreConfig",
    "TrainConfig",
    "TuneConfig",
    "WeighConfig",
    "Weighing",
]
