"""Mirrors skeyd/worker."""
