"""What a network says about data, and figures of it."""
