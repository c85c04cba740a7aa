"""Mirrors skeyd/; emulated/ runs on a real s390x kernel."""
