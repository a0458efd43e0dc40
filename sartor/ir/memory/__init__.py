"""Memory of one inference: buffers, the schedule that needs least of it, and offsets in an arena."""

from sartor.ir.memory.arena import Allocation, Arena, best_fit, greedy_by_size, plan_arena
from sartor.ir.memory.buffers import BufferGraph, InPlace, Step
from sartor.ir.memory.peak import peak
from sartor.ir.memory.schedule import Schedule, schedule

__all__ = [
    "Allocation",
    "Arena",
    "BufferGraph",
    "InPlace",
    "Schedule",
    "Step",
    "best_fit",
    "greedy_by_size",
    "peak",
    "plan_arena",
    "schedule",
]
