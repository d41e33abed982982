"""What one worker holds."""
