"""Configs: what a file may say, how it is read and checked, and what is made of it."""
