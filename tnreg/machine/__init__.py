"""Disk, memory, terminal and other processes."""
