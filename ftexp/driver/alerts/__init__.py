"""Alerts to operators: when (rules), by which way (mailbox), and the thread that watches (watch)."""
