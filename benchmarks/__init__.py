"""Measurements: ratios of two things in one run, never seconds. Not tests: nothing here passes or fails."""
