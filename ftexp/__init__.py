"""ftexp."""
