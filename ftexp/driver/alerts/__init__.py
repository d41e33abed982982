"""Alerts to operators: the rules for them (rules), their delivery (mailbox), and the watching thread (watch)."""
