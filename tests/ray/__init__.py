"""Tests that need a Ray instance, or processes like those that Ray starts."""
