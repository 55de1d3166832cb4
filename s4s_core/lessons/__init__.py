"""What the lessons draw and ask."""
