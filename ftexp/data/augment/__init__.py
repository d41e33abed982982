"""What is done to images, seeded by their position."""
