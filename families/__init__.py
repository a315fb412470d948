"""Bases that diffusers holds: folders of its pipelines, one row for each family."""
