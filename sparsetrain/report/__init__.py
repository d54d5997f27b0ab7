"""Seeing what a sparse run does: events, tables, plots, the HTML page."""
