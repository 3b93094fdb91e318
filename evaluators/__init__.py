"""Judges of what somebody else made: scorers, benchmarks, reports. May import `mmalign`, never a trainer."""
