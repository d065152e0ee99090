"""The command line: from what is typed to runs, and what they leave for those who typed it."""
