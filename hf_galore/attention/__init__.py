"""What attention attends to besides the tokens: explicit keys and values, and sinks."""
