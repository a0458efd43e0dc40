"""Memory of one inference: buffers, the schedule that needs least of it, and offsets in an arena."""

from sartor.ir.memory.arena import (
    Allocation,
    Arena,
    best_fit,
    best_fit_by_size,
    greedy_by_size,
    peak_with_reuse,
    plan_arena,
)
from sartor.ir.memory.buffers import BufferGraph, InPlace, Step
from sartor.ir.memory.peak import peak
from sartor.ir.memory.programs import ProgramBuffers, program_buffers
from sartor.ir.memory.rules import DEFAULT, MICROCONTROLLER, PLAIN, Rules
from sartor.ir.memory.schedule import Schedule, schedule

__all__ = [
    "DEFAULT",
    "MICROCONTROLLER",
    "PLAIN",
    "Allocation",
    "Arena",
    "BufferGraph",
    "InPlace",
    "ProgramBuffers",
    "Rules",
    "Schedule",
    "Step",
    "best_fit",
    "best_fit_by_size",
    "greedy_by_size",
    "peak",
    "peak_with_reuse",
    "plan_arena",
    "program_buffers",
    "schedule",
]
