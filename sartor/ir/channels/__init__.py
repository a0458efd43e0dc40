"""Channel groups by label propagation: every prunable dimension of a program, exact or blocked with a reason."""

from sartor.ir.channels.analysis import ChannelAnalysis, channel_groups
from sartor.ir.channels.group import BlockedAxis, ChannelGroup, Member, coarsest

__all__ = ["BlockedAxis", "ChannelAnalysis", "ChannelGroup", "Member", "channel_groups", "coarsest"]
