"""Scores, plots and the report; the only room that reads annotations."""
