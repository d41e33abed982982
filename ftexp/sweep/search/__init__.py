"""What a search proposes."""
