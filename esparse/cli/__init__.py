"""The command line: parses and checks what the user types, carries out runs, and reports their results."""
