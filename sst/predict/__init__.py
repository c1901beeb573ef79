"""Landmarks on new images, their names, and exports of a trained model."""
