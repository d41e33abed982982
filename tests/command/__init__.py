"""Tests that start a command."""
