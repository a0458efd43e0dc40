"""Recovery of quality after a program was cut: distillation from the original. Imports torch."""

from sartor.recovery.distillation import RecoveryOptions, RecoveryResult, distill
from sartor.recovery.twins import predictor

__all__ = ["RecoveryOptions", "RecoveryResult", "distill", "predictor"]
