"""Tests that need a Ray instance, or processes as Ray starts them."""
