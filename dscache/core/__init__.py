"""The sans-IO core in Python, and the parts of the compiled one."""
