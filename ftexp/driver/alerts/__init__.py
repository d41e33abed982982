"""What operators are alerted of: when (rules), by which way (mailbox), and the thread that watches (watch)."""
