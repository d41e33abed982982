"""Failures: their causes and detection, the decisions about them, and the reports to the driver."""
