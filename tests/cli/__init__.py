"""Tests of skeyctl."""
