"""Tests of skeyd.client."""
