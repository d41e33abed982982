"""The checks of a config. A message gives the key, the value and what is allowed."""
