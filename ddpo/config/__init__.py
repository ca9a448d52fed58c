"""Every command's settings as frozen dataclasses. Loads neither torch nor transformers. The docstring of a field is its
help text."""

from ddpo.config.data import Encoding, PrepareConfig, WeighConfig, Weighing
from ddpo.config.export import ExportConfig
from ddpo.config.report import ReportConfig
from ddpo.config.reward import RewardConfig, ScoreConfig
from ddpo.config.sampling import (
    AnnotateConfig,
    DemoConfig,
    DoctorConfig,
    EvaluateConfig,
    GenerateConfig,
    Measuring,
    WinrateConfig,
)
from ddpo.config.training import PlanConfig, TrainConfig, TuneConfig

__all__ = [
    "AnnotateConfig",
    "DemoConfig",
    "DoctorConfig",
    "Encoding",
    "EvaluateConfig",
    "ExportConfig",
    "GenerateConfig",
    "Measuring",
    "PlanConfig",
    "PrepareConfig",
    "ReportConfig",
    "RewardConfig",
    "ScoreConfig",
    "TrainConfig",
    "TuneConfig",
    "WeighConfig",
    "Weighing",
    "WinrateConfig",
]
