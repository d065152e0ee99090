"""One HTML page of many runs, in a file that needs nothing else: a table, what stands behind its rows, figures."""
