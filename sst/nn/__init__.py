"""What happens on the device: network, views, losses and steps; torch and numpy alone."""
