"""Every check of a config, each with one message: key, value, what is allowed."""
