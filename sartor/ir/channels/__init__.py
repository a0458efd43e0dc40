"""Channel groups by label propagation: every prunable dimension of a program, exact or blocked with a reason."""

from sartor.ir.channels.analysis import BlockedAxis, ChannelAnalysis, ChannelGroup, Member, channel_groups

__all__ = ["BlockedAxis", "ChannelAnalysis", "ChannelGroup", "Member", "channel_groups"]
